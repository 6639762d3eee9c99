"""The variants in timm's listings."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
from timm.models import _registry as timm_registry
from timm.models import is_model, model_entrypoint, register_model
from torch import nn

from sem_timm.compat import get_arch_pretrained_cfgs
from sem_timm.registry import register_variants
from tests.registry.models import BASES, gates
from tests.versions import clear_model_entries


@pytest.fixture
def user_architecture() -> Iterator[str]:
    """An architecture that timm does not have, registered for the duration of a test."""

    def user_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return model_entrypoint('test_resnet')(pretrained=pretrained, **kwargs)

    user_resnet.__module__ = __name__
    register_model(user_resnet)
    yield 'user_resnet'
    for name in ('user_resnet', *(f'user_resnet_{suffix}' for suffix in ('sem', 'ea', 'eamlp'))):
        timm_registry._model_entrypoints.pop(name, None)
        clear_model_entries(name)


def test_every_architecture_has_a_variant() -> None:
    assert timm.list_models('*_sem') == sorted((f'{name}_sem' for name in BASES), key=timm_registry._natural_key)
    if timm.__version__ == '1.0.31':
        assert len(timm.list_models('*_sem')) == 1371


def test_pretrained_tags_mirror_the_bases() -> None:
    for base in BASES:
        expected = [name.replace(base, f'{base}_sem', 1) for name in get_arch_pretrained_cfgs(base)]
        assert list(get_arch_pretrained_cfgs(f'{base}_sem')) == expected
    pretrained = [name for name in timm.list_pretrained() if timm.models.get_arch_name(name) in BASES]
    assert {re.sub(r'_sem(?=\.|$)', '', name) for name in timm.list_pretrained('*_sem')} == set(pretrained)
    assert timm.list_pretrained('resnet50_sem*')[0] == 'resnet50_sem.a1_in1k'


def test_weights_stay_in_the_repositories_of_the_bases() -> None:
    for base in BASES:
        cfgs, mirrored = get_arch_pretrained_cfgs(base), get_arch_pretrained_cfgs(f'{base}_sem')
        for cfg, mirror in zip(cfgs.values(), mirrored.values(), strict=True):
            assert (mirror.hf_hub_id, mirror.url, mirror.tag) == (cfg.hf_hub_id, cfg.url, cfg.tag)
            assert (mirror.architecture, cfg.architecture) == (f'{base}_sem', base)
    default = timm.models.get_pretrained_cfg('resnet50_sem')
    assert default is not None and default.hf_hub_id == 'timm/resnet50.a1_in1k'


def test_cfgs_of_users_in_either_form_are_mirrored(user_architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entrypoint, old = model_entrypoint(user_architecture), {'url': 'https://example.org/old.pth', 'num_classes': 7}
    new = timm.models.generate_default_cfgs({'user_resnet.tag': {'hf_hub_id': 'timm/', 'num_classes': 7}})[
        'user_resnet'
    ]
    for given, source in ((old, old['url']), (new, 'timm/user_resnet.tag')):
        for name in ('user_resnet', 'user_resnet_sem'):
            timm_registry._model_entrypoints.pop(name, None)
            clear_model_entries(name)
        monkeypatch.setitem(globals(), 'default_cfgs', {'user_resnet': given})
        register_model(entrypoint)
        register_variants('sem')
        (mirrored,) = get_arch_pretrained_cfgs('user_resnet_sem').values()
        assert source in (mirrored.url, mirrored.hf_hub_id) and mirrored.num_classes == 7
        assert mirrored.architecture == 'user_resnet_sem'


def test_listings_of_modules_are_unchanged() -> None:
    for module in timm.list_modules():
        has_variants = any(name.endswith('_sem') for name in timm.list_models(module=module))
        assert has_variants == (module == 'registry')
    assert timm.models.is_model_in_modules('resnet50_sem', ['registry'])
    assert not timm.models.is_model_in_modules('resnet50_sem', ['resnet'])


def test_entrypoints_are_functions_of_an_importable_module() -> None:
    for name in ('resnet50_sem', 'test_vit_sem'):
        entrypoint = model_entrypoint(name, module_filter='registry')
        assert inspect.isfunction(entrypoint) and entrypoint.__name__ == entrypoint.__qualname__ == name
        module = importlib.import_module(entrypoint.__module__)
        assert getattr(module, name) is entrypoint and name in module.__all__
        assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint


def test_registering_again_changes_nothing() -> None:
    before = dict(timm_registry._model_entrypoints)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        register_variants()
    assert timm_registry._model_entrypoints == before


def test_architectures_of_users_can_have_variants(user_architecture: str) -> None:
    assert not is_model('user_resnet_sem')
    register_variants()
    assert gates(timm.create_model('user_resnet_sem'))
