"""Weights of a base that come into a variant make identities of its gates, whichever way they come."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import sem_timm
from sem_timm import BaseWeightsWarning, SwapWarning, WeightsError
from tests.families import FAMILIES
from tests.thorough import first_of_each
from tests.twins import inserted, trained

# Of each a family with its options, and names of the variants whose gates are identities, or never are.
SEM = {'resnet': 'test_resnet_sem', 'vit_registers': 'test_vit_sem'}
SWAPPED = ('test_vit_ea', 'test_vit_eamlp')


def outputs(model: nn.Module, family: str = 'resnet') -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(FAMILIES[family].images())
    return out


def variant(name: str = 'test_resnet_sem', family: str = 'resnet', **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return timm.create_model(name, num_classes=10, **FAMILIES[family].options, **options)


def lenient(model: nn.Module, base: nn.Module) -> nn.Module:
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def strict(model: nn.Module, base: nn.Module) -> nn.Module:
    loaded = model.load_state_dict(base.state_dict())
    assert not loaded.missing_keys and not loaded.unexpected_keys
    return model


def assigned(model: nn.Module, base: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(base.state_dict()), assign=True)
    assert all(isinstance(parameter, nn.Parameter) for parameter in inserted(model).values())
    return model


def copied(model: nn.Module, base: nn.Module) -> nn.Module:
    return strict(copy.deepcopy(model), base)


def of_another_type(model: nn.Module, base: nn.Module) -> nn.Module:
    return strict(model.half().double(), base).float()


def inside_of_another(model: nn.Module, base: nn.Module) -> nn.Module:
    nn.Sequential(nn.Identity(), model).load_state_dict({f'1.{key}': t for key, t in base.state_dict().items()})
    return model


def compiled(model: nn.Module, base: nn.Module) -> nn.Module:
    whole: Any = torch.compile(model)
    whole.load_state_dict({f'_orig_mod.{key}': t for key, t in base.state_dict().items()})
    return model


def averaged(model: nn.Module, base: nn.Module) -> nn.Module:
    average = ModelEmaV3(model)
    average.load_state_dict({f'module.{key}': t for key, t in base.state_dict().items()})
    inside: nn.Module = average.module
    return inside


def without_head(model: nn.Module, base: nn.Module) -> nn.Module:
    heads = ('fc.', 'head.')
    state = base.state_dict()
    model.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith(heads)}, strict=False)
    model.load_state_dict({key: tensor for key, tensor in state.items() if key.startswith(heads)}, strict=False)
    return model


WAYS = (lenient, strict, assigned, copied, of_another_type, inside_of_another, compiled, averaged, without_head)


@pytest.mark.parametrize('family', first_of_each(SEM))
@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_state_dicts_of_the_base(way: Callable[..., nn.Module], family: str) -> None:
    base, model = FAMILIES[family].create(), variant(SEM[family], family)
    kept = {name: p.clone() for name, p in inserted(model).items() if 'decision' in name}
    assert not torch.equal(outputs(model, family), outputs(base, family))
    loaded = way(model, base)
    assert torch.equal(outputs(loaded, family), outputs(base, family))
    if way is strict:  # identities that learn as any others, from the values that were drawn
        assert all(torch.equal(p, inserted(loaded)[name]) for name, p in kept.items())
        assert all(module.form == 'identity' for module in loaded.modules() if isinstance(module, sem_timm.SEM))


def saved(folder: Path, kind: str, state: dict[str, Tensor]) -> str:
    file = str(folder / f'{kind}.pth')
    if kind == 'safetensors':
        file = str(folder / 'model.safetensors')
        safetensors.torch.save_file(state, file)
    elif kind == 'plain':
        torch.save(state, file)
    elif kind == 'distributed':
        torch.save({'state_dict': {f'module.{key}': tensor for key, tensor in state.items()}}, file)
    else:
        noise = {key: tensor.new_zeros(tensor.shape) for key, tensor in state.items()}
        average = {f'_orig_mod.{key}': tensor for key, tensor in state.items()}
        torch.save({'state_dict': noise, 'state_dict_ema': average}, file)
    return file


@pytest.mark.parametrize('kind', ['plain', 'safetensors', 'distributed', 'average'])
def test_checkpoints_of_the_base(tmp_path: Path, kind: str) -> None:
    base = FAMILIES['resnet'].create()
    file, expected = saved(tmp_path, kind, base.state_dict()), outputs(base)
    assert torch.equal(outputs(variant(checkpoint_path=file)), expected)
    for is_strict in (True, False):
        load_checkpoint(model := variant(), file, strict=is_strict)
        assert torch.equal(outputs(model), expected)
    overlay = {'file': file, 'num_classes': 10}
    assert torch.equal(outputs(variant(pretrained=True, pretrained_cfg_overlay=overlay)), expected)
    if kind == 'safetensors':
        safetensors.torch.load_model(model := variant(), file)
        assert torch.equal(outputs(model), expected)


def test_backbones_take_weights_of_the_base() -> None:
    base: Any = FAMILIES['resnet'].create(features_only=True)
    model = timm.create_model('test_resnet_sem', features_only=True)
    model.load_state_dict(base.state_dict())
    assert all(map(torch.equal, model.eval()(FAMILIES['resnet'].images()), base(FAMILIES['resnet'].images())))


def test_only_blocks_that_get_weights_change() -> None:
    base, model = FAMILIES['resnet'].create(), variant()
    state = base.state_dict()
    model.load_state_dict({key: t for key, t in state.items() if key.startswith('fc.')}, strict=False)
    assert {gate.form for gate in model.modules() if isinstance(gate, sem_timm.SEM)} == {'paper'}
    model.load_state_dict({key: t for key, t in state.items() if key.startswith(('layer1.', 'layer2.'))}, strict=False)
    forms = {part.name: model.get_submodule(part.name).sem.form for part in sem_timm.patched_modules(model)}
    assert forms == {'layer1.0': 'identity', 'layer2.0': 'identity', 'layer3.0': 'paper', 'layer4.0': 'paper'}


def test_own_weights_load_as_ever() -> None:
    model, other = trained(variant()), variant()
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), outputs(model))
    gates = {key: tensor for key, tensor in model.state_dict().items() if '.sem.' in key}
    third = variant()
    third.load_state_dict(gates, strict=False)
    assert all(torch.equal(third.state_dict()[key], tensor) for key, tensor in gates.items())
    with pytest.raises(RuntimeError, match=r'Missing key.*layer1.0.sem.decision.weight'):
        third.load_state_dict({k: t for k, t in model.state_dict().items() if k != 'layer1.0.sem.decision.weight'})


def test_gates_with_something_to_lose_keep_it_aloud() -> None:
    base = FAMILIES['resnet'].create()
    for model in (trained(variant()), variant(sem_init='paper'), trained(variant(sem_init='identity'))):
        before = {name: parameter.clone() for name, parameter in inserted(model).items()}
        with pytest.warns(BaseWeightsWarning, match=r'none for layer1.0.sem.*keep their values') as caught:
            model.load_state_dict(base.state_dict(), strict=False)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert all(torch.equal(before[name], parameter) for name, parameter in inserted(model).items())
        with sem_timm.disabled(model):
            assert torch.equal(outputs(model), outputs(base))
        model.load_state_dict(base.state_dict(), strict=False)  # the same weights again say nothing new
        with pytest.raises(WeightsError, match=r'disabled.*reset_parameters'):
            model.load_state_dict(base.state_dict())
        for part in sem_timm.patched_modules(model):
            model.get_submodule(part.name).sem.reset_parameters('identity')
        assert torch.equal(outputs(strict(model, base)), outputs(base))


def test_one_step_of_training_is_something_to_lose() -> None:
    base, model = FAMILIES['resnet'].create(), variant(zero_init_last=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(FAMILIES['resnet'].images()).square().mean().backward()
    optimizer.step()
    with pytest.warns(BaseWeightsWarning):
        model.load_state_dict(base.state_dict(), strict=False)


@pytest.mark.parametrize('name', SWAPPED)
def test_no_identity_is_said_to_be_none(tmp_path: Path, name: str) -> None:
    base, model = FAMILIES['vit_registers'].create(), variant(name, 'vit_registers')
    with pytest.warns(SwapWarning, match=r'none for blocks.0.attn.core.*needs training.\n.*transfer') as caught:
        model.load_state_dict(base.state_dict(), strict=False)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.state_dict().items())
    model.load_state_dict(base.state_dict(), strict=False)
    file = saved(tmp_path, 'plain', base.state_dict())
    for load in (lambda: strict(model, base), lambda: variant(name, 'vit_registers', checkpoint_path=file)):
        with pytest.raises(WeightsError, match=r'patch_model.base, .*strict=False'):
            load()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.load_state_dict(trained(variant(name, 'vit_registers')).state_dict())
