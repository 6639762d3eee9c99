"""The variants with another attention in timm's listings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import timm
from timm.models import _registry as timm_registry
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, register_model
from torch import nn

import sem_timm
from sem_timm import AttentionCore, OptionError, RefusedError
from sem_timm.compat import get_arch_pretrained_cfgs
from sem_timm.registry.table import read_table
from tests.registry.models import BASES
from tests.versions import since_timm, weightless

SOURCES = {'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'architecture'}


@pytest.fixture
def newer_architectures(registrations: None) -> tuple[str, str]:
    """Architectures that the table does not know, with and without attention."""

    def newer_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return model_entrypoint('test_vit')(pretrained=pretrained, **kwargs)

    def newer_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return model_entrypoint('test_resnet')(pretrained=pretrained, **kwargs)

    for entrypoint in (newer_vit, newer_resnet):
        entrypoint.__module__ = __name__
        register_model(entrypoint)
    return 'newer_vit', 'newer_resnet'


def named(suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in timm.list_models(f'*{suffix}')}


@since_timm('1.0.31', 'architecture that the table does not know')
def test_architectures_with_sites_have_variants_and_others_have_not() -> None:
    sites = {name: counts for name, counts in read_table().sites.items() if name in BASES}
    for place, suffix in enumerate(('_ea', '_eamlp', '_monarch')):
        assert named(suffix) == {name for name, counts in sites.items() if counts[place]}
    assert {'vit_small_patch16_224', 'swin_tiny_patch4_window7_224'} <= named('_ea') & named('_eamlp')
    assert len(named('_ea')) >= 618 and len(named('_eamlp')) >= 481


def test_variant_of_an_architecture_without_attention_does_not_exist() -> None:
    for name in ('resnet50_ea', 'resnet50_eamlp', 'cait_xxs24_224_ea', 'gcvit_xxtiny_eamlp'):
        assert not is_model(name)
        with pytest.raises(RuntimeError, match=f'Unknown model .{name}'):
            timm.create_model(name)


def test_no_pretrained_weights_are_claimed() -> None:
    assert timm.list_pretrained('*_ea') == timm.list_pretrained('*_eamlp') == []
    assert timm.list_models('*_ea*', pretrained=True) == []
    for name in ('vit_small_patch16_224_ea', 'vit_small_patch16_224_ea.augreg_in21k_ft_in1k'):
        assert not timm.models.is_model_pretrained(name)
    assert timm.list_pretrained('vit_small_patch16_224.*')
    assert timm_registry._model_default_cfgs['vit_small_patch16_224_ea'].is_pretrained is False


def test_cfgs_are_those_of_the_base_but_for_the_weights() -> None:
    for base in sorted(named('_ea')):
        cfgs, mirrored = get_arch_pretrained_cfgs(base), get_arch_pretrained_cfgs(f'{base}_ea')
        assert list(mirrored) == [name.replace(base, f'{base}_ea', 1) for name in cfgs]
        for cfg, mirror in zip(cfgs.values(), mirrored.values(), strict=True):
            differing = {field.name for field in fields(cfg) if getattr(cfg, field.name) != getattr(mirror, field.name)}
            assert differing <= SOURCES and not mirror.has_weights
    default = get_pretrained_cfg('vit_small_patch16_224_ea')
    assert default is not None and default.tag == 'augreg_in21k_ft_in1k' and default.mean == (0.5, 0.5, 0.5)


def test_newer_architectures_have_variants_if_a_plan_finds_attention(newer_architectures: tuple[str, str]) -> None:
    sem_timm.register_variants()
    for base in newer_architectures:
        assert is_model(f'{base}_sem') and is_model(f'{base}_ea') and is_model(f'{base}_eamlp')
    for suffix in ('ea', 'eamlp', 'monarch'):
        assert sem_timm.patched_modules(weightless(f'newer_vit_{suffix}'))
        with pytest.raises(RefusedError, match='nothing in ResNet can take'):
            weightless(f'newer_resnet_{suffix}')


@pytest.mark.parametrize('operation', ['efficient', 'linear', 'halo', 'catt', 'caam'])
def test_other_attentions_are_registered_on_request(operation: str, registrations: None) -> None:
    assert not is_model(f'test_vit_{operation}')
    sem_timm.register_variants(operation)
    assert named(f'_{operation}') == named('_ea')
    assert timm.list_pretrained(f'*_{operation}') == []
    option = {f'{operation}_target': r'blocks\.[01]\.attn'}
    model = weightless(f'test_vit_{operation}', **option)
    cores = {name: core for name, core in model.named_modules() if isinstance(core, AttentionCore)}
    assert {name.rpartition('.')[0] for name in cores} == {'blocks.0.attn', 'blocks.1.attn'}
    assert {part.operation for part in sem_timm.patched_modules(model)} == {sem_timm.AttentionConfig(operation)}


def test_options_of_other_attentions_have_their_prefix(registrations: None) -> None:
    sem_timm.register_variants('linear')
    model = weightless('test_vit_linear', linear_centre_keys=True)
    (operation,) = {part.operation for part in sem_timm.patched_modules(model)}
    assert dict(operation.options)['centre_keys'] is True


def test_several_attentions_are_registered_at_once_and_registered_ones_are_left(registrations: None) -> None:
    before = dict(timm_registry._model_entrypoints)
    sem_timm.register_variants('sem', 'external', 'eamlp')
    assert timm_registry._model_entrypoints == before
    sem_timm.register_variants('external', 'linear', 'efficient')
    added = timm_registry._model_entrypoints.keys() - before.keys()
    assert added == {f'{base}_{operation}' for base in named('_ea') for operation in ('linear', 'efficient')}


def test_operations_without_variants_are_an_error() -> None:
    with pytest.raises(OptionError, match=r"for 'eficient'. Close: efficient"):
        sem_timm.register_variants('eficient')
    for operation in ('se', 'external2d', 'ea', ''):
        with pytest.raises(OptionError, match='no variants can be registered for'):
            sem_timm.register_variants('linear', operation)
    assert not is_model('test_vit_linear')
