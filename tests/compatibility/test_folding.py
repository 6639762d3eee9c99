"""Models that lose channels, weights or branches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models import adapt_model_from_string
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import prune

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import (
    Twins,
    assert_close,
    assert_same_gradients,
    gradients,
    move,
    new_parameters,
    unpatched,
)
from tests.outputs import outputs
from tests.twins import assert_equal


@capability("timm's channel pruning (`adapt_model_from_string`), patched afterwards")
def test_channel_pruning(twins: Twins) -> None:
    with unpatched():
        base = narrower(twins.base)
        expected = outputs(base, twins.images())
    assert sum(p.numel() for p in base.parameters()) < sum(p.numel() for p in twins.base.parameters())
    model = twins.patch(copy.deepcopy(base))
    assert_equal(outputs(model, twins.images()), expected)
    assert_same_gradients(twins, gradients(base, twins.images()), gradients(model, twins.images()), model=model)
    assert not torch.equal(outputs(move(model), twins.images())[0], expected[0])
    assert_equal(outputs(sem_timm.unpatch_model(model), twins.images()), expected)


# Which axes of which weights count the channels between the convolutions of a residual block.
_BASIC_BLOCK = {'conv1': 0, 'bn1': 0, 'conv2': 1}
_INVERTED_RESIDUAL = {'conv_pw': 0, 'bn1': 0, 'conv_dw': 0, 'bn2': 0, 'se.conv_reduce': 1, 'se.conv_expand': 0}


def narrower(model: Any) -> Any:
    """The model with half as many channels between the convolutions of each block."""
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        axes = {'BasicBlock': _BASIC_BLOCK, 'InvertedResidual': {**_INVERTED_RESIDUAL, 'conv_pwl': 1}}.get(
            type(module).__name__, {}
        )
        for key, shape in shapes.items():
            for start, axis in axes.items():
                if key.startswith(f'{name}.{start}.') and axis < len(shape):
                    shape[axis] //= 2
    torch.manual_seed(0)
    text = '***'.join(f'{key}:[{", ".join(map(str, shape))}]' for key, shape in shapes.items())
    return adapt_model_from_string(model, text).eval()


@capability('`torch.nn.utils.prune`')
def test_weight_pruning(twins: Twins) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        model = copy.deepcopy(model)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not set(name.split('.')) & {'sem', 'core'}:
                prune.l1_unstructured(module, 'weight', amount=0.5)
        return outputs(model, twins.images())

    twins.same(use)
    model = twins.moved()
    for name in {name.rpartition('.')[0] for name, p in new_parameters(model).items() if name.endswith('.weight')}:
        prune.l1_unstructured(model.get_submodule(name), 'weight', amount=0.5)
        assert (model.get_submodule(name).weight == 0).float().mean() >= 0.4
        prune.remove(model.get_submodule(name), 'weight')
    found = outputs(model, twins.images())
    other = twins.patch(copy.deepcopy(twins.base))
    other.load_state_dict(model.state_dict())
    assert_equal(outputs(other, twins.images()), found)


@capability('`reparameterize_model`, patched afterwards', shown_by='repvgg')
def test_patched_after_reparameterization(twins: Twins) -> None:
    with unpatched():
        base = reparameterize_model(twins.base).eval()
        expected = outputs(base, twins.images())
    model = twins.patch(copy.deepcopy(base))
    if twins.is_identity:
        assert_equal(outputs(model, twins.images()), expected)
    assert_same_gradients(twins, gradients(base, twins.images()), gradients(model, twins.images()), model=model)
    assert not torch.equal(outputs(move(model), twins.images())[0], expected[0])
    assert_equal(outputs(sem_timm.unpatch_model(model), twins.images()), expected)


@capability('`reparameterize_model` of a patched model')
def test_patched_before_reparameterization(twins: Twins) -> None:
    with unpatched():
        folded = reparameterize_model(twins.base)
        expected = outputs(folded, twins.images())
    if twins.is_identity:
        # Folding rounds differently.
        assert_close(outputs(reparameterize_model(twins.model), twins.images()), expected, scale=1e-3, rtol=1e-3)
    model = twins.moved()
    assert_close(
        outputs(reparameterize_model(model), twins.images()), outputs(model, twins.images()), scale=1e-3, rtol=1e-3
    )
