"""What reads whole models by torch.fx reads patched ones, with the same numbers in either mode and for any batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor

import sem_timm
from sem_timm.layers import attention_names, excitation_names
from sem_timm.layers.sem import DECISION_FORMS
from tests.lively import lively
from tests.thorough import first_of_each
from tests.twins import trained
from tests.versions import needs_argument

# Operations with their options; what is not the same code for every place, in both layouts.
OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f'sem_{decision}': ('sem', {'decision': decision}) for decision in DECISION_FORMS},
    'sem_of_all': ('sem', {'operators': excitation_names()}),
    **{name: (name, {}) for name in excitation_names()},
    'external2d': ('external2d', {'memory': 8}),
}
# Those of timm that its own plain models can be traced with.
TIMM = ['timm_se', 'timm_ese', 'timm_eca', 'timm_ceca', 'timm_gc']

ROUNDING = 1e-12  # of double precision, through a whole network


def patched(name: str, operation: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=5))
    sem_timm.patch_model(model, operation, input_size=(3, 32, 32), **options)
    return trained(model).eval()


def assert_same(model: nn.Module, traced: nn.Module) -> None:
    """Both compute the same, in either mode, with gradients and without, for several sizes of batches and images.

    In double precision, up to rounding: the trace calls the convolution of ECA as a layer, and the model by itself
    calls it as one of an image, for which some CPUs have another kernel.
    """
    model, traced = copy.deepcopy(model).double(), copy.deepcopy(traced).double()
    for size, batch_size in ((32, 3), (64, 1)):
        images = torch.randn(batch_size, 3, size, size, dtype=torch.float64)
        for training in (False, True):
            outputs = []
            for each in (copy.deepcopy(model), copy.deepcopy(traced)):
                each.train(training and batch_size > 1)
                with torch.no_grad():
                    outputs.append(each(images))
                outputs.append(each(images).detach())
            torch.testing.assert_close(outputs[2:], outputs[:2], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize('operation', ['sem_of_all', *first_of_each([*OPERATIONS, *TIMM])])
def test_symbolic_trace(operation: str) -> None:
    name, options = OPERATIONS.get(operation, (operation, {}))
    model = patched('test_resnet', name, **options)
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        assert fx.symbolic_trace(model).code == traced.code
    assert_same(model, traced)
    assert traced.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize('operation', first_of_each([*OPERATIONS, 'timm_se', 'timm_eca']))
def test_symbolic_trace_with_channels_last(operation: str) -> None:
    name, options = OPERATIONS.get(operation, (operation, {}))
    model = patched('test_convnext', name, **options)
    traced = fx.symbolic_trace(model).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(traced(images), model.double()(images), rtol=ROUNDING, atol=ROUNDING)


def test_traced_operators_are_layers_that_tools_find() -> None:
    nodes = fx.symbolic_trace(patched('test_resnet', 'sem')).graph.nodes
    called = {str(node.target).partition('.sem.')[2] for node in nodes if node.op == 'call_module'}
    assert {'operators.se.fc1', 'operators.se.fc2', 'operators.eca.conv', 'decision'} <= called


def test_a_gate_alone_is_traced() -> None:
    gate = trained(sem_timm.SEM(16))
    x, shortcut = torch.randn(2, 16, 5, 5), torch.randn(2, 16, 5, 5)
    traced = fx.symbolic_trace(gate)
    assert torch.equal(traced(x, shortcut), gate(x, shortcut))


@pytest.mark.parametrize('operation', first_of_each(['sem_sigmoid', 'lct', 'eca', 'external2d', 'timm_se']))
@pytest.mark.filterwarnings('ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*reduce_range.*:UserWarning')
def test_what_tools_make_of_a_traced_model(operation: str) -> None:
    name, options = OPERATIONS.get(operation, (operation, {}))
    model = patched('test_resnet', name, **options)
    images = torch.randn(2, 3, 64, 64)

    def features(each: nn.Module) -> Tensor:
        out: Tensor = create_feature_extractor(each, ['layer3.0.act3'])(images)['layer3.0.act3']
        return out

    def prepared(each: nn.Module) -> Tensor:
        out: Tensor = prepare_fx(each, get_default_qconfig_mapping('x86'), (images,))(images)
        return out

    with torch.no_grad():
        assert features(copy.deepcopy(model)).shape[0] == 2
        for made in (prepared(copy.deepcopy(model)), fuse(copy.deepcopy(model))(images)):
            torch.testing.assert_close(made, model(images), rtol=1e-3, atol=1e-3)  # batch norms are folded


def small_transformer(operation: str) -> Any:
    """A transformer of two blocks whose attention was swapped, and does something."""
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    model: Any = lively(timm.create_model('vit_tiny_patch16_224', **small))  # type: ignore[arg-type]
    sem_timm.patch_model(model, operation, input_size=(3, 32, 32))
    trained(model).eval()
    return model


@pytest.mark.filterwarnings('ignore::sem_timm.SwapWarning')
@pytest.mark.parametrize('operation', attention_names())
def test_attention_that_was_swapped(operation: str) -> None:
    model = small_transformer(operation)
    traced = fx.symbolic_trace(model, concrete_args={'attn_mask': None, 'is_causal': False})
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(traced(images), model(images))
        traced(images).sum().backward()
    gradients = {name for name, parameter in traced.named_parameters() if parameter.grad is not None}
    assert any('.qkv.' in name for name in gradients) or operation == 'eamlp'


@pytest.mark.filterwarnings('ignore::sem_timm.SwapWarning')
@needs_argument('is_causal')
@pytest.mark.parametrize('operation', attention_names())
def test_a_trace_that_leaves_arguments_open_checks_them_when_it_runs(operation: str) -> None:
    """As torchvision traces, and timm with it: what may be given later stands for something, so the mask is there."""
    model = small_transformer(operation)
    extractor: Any = create_feature_extractor(model, ['blocks.1'])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=[1], output_fmt='NLC', intermediates_only=True)[0]
        torch.testing.assert_close(extractor(images)['blocks.1'][:, 1:], expected)
        with pytest.raises(sem_timm.GuardError, match='is_causal'):
            extractor(images, is_causal=True)
