"""Packed projections with a batch norm: only the rows that are read are computed, unless somebody changed them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import sem_timm
from tests.families import Family
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES
from tests.swap.swapping import assert_all_learn, backward, outputs, swap, swapped, tensors
from tests.swap.test_cost import calls_of, flops
from tests.thorough import first_of_each

# Whose packed projection is a linear layer or convolution with a batch norm: a site, the projection's child, all its
# rows, and those read.
NORMED = {
    'models.levit.Attention': ('stages.0.blocks.0.attn', 'qkv', 'linear', 256, 64),
    'models.shvit.SHSA': ('stages.1.blocks.0.mixer.m', 'qkv', 'c', 80, 16),
    'models.efficientvit_msra.CascadedGroupAttention': (
        'stages.0.blocks.0.mixer.m.attn',
        'qkvs.1',
        'conv',
        48,
        16,
    ),
}
normed = pytest.mark.parametrize('name', first_of_each(NORMED))


def packed_child(model: nn.Module, name: str) -> Any:
    site, child, *_ = NORMED[name]
    return model.get_submodule(f'{site}.{child}')


def norm_of(child: Any) -> Any:
    return list(child.children())[1]


def with_all_rows(model: nn.Module, name: str) -> nn.Module:
    """A copy that computes all rows of the projections with a norm: they have hooks, so they are called as a whole."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) is type(packed_child(model, name)):
            module.register_forward_hook(lambda *_: None)
    return twin


@normed
def test_the_plan_tells_which_rows_are_read(name: str) -> None:
    family = CLASSES[name]
    site, child, projection, total, read = NORMED[name]
    plan = sem_timm.plan_model(family.create(), 'external', input_size=family.input_size)
    rows = plan.sliced[f'{site}.{child}.{projection}.weight']
    assert rows.total == total and rows.total // rows.period * (rows.last - rows.first) == read
    assert plan.code(site).count('projected_rows(') == (4 if child == 'qkvs.1' else 1)


@pytest.mark.parametrize('training', [False, True])
@normed
def test_only_the_rows_that_are_read_are_computed(name: str, training: bool) -> None:
    family = CLASSES[name]
    site, _, _, total, read = NORMED[name]
    model = swapped(family).train(training)
    whole = with_all_rows(model, name)
    calls = calls_of(model, {site: model.get_submodule(site)}, family.images())
    costs = [flops(each.get_submodule(site), *calls[site]) for each in (whole, model)]
    attention: Any = model.get_submodule(site)
    packed = list(attention.qkvs) if name.endswith('GroupAttention') else [attention.qkv]
    tokens = calls[site][0][0].numel() // calls[site][0][0].shape[-1 if 'levit' in name else 1]
    unread = sum(next(child.parameters()).numel() for child in packed) * (total - read) // total
    assert costs[0] - costs[1] == 2 * tokens * unread


def test_what_a_module_costs_whose_heads_are_interleaved() -> None:
    """Queries, two products with the memories, and the last projection; nothing else."""
    name, memory = 'models.levit.Attention', 16
    family = CLASSES[name]
    model = swapped(family, memory=memory)
    site, _, _, total, read = NORMED[name]
    attention: Any = model.get_submodule(site)
    calls = calls_of(model, {site: attention}, family.images())
    tokens, values = math.prod(calls[site][0][0].shape[:2]), 128
    weights = attention.qkv.linear.weight.numel() * read // total + attention.proj.ln.linear.weight.numel()
    assert flops(attention, *calls[site]) == 2 * tokens * (weights + (read + values) * memory)


@normed
def test_outputs_in_both_modes_and_running_statistics_are_those_of_the_whole_projection(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    whole, before = with_all_rows(model, name), copy.deepcopy(model)
    inputs = inputs_of_site(model, name)
    for training in (False, True, True, True, False):
        found, expected = (outputs(site_of(each.train(training), name), inputs) for each in (model, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one, other, old = (norm_of(packed_child(each, name)) for each in (model, whole, before))
    assert one.num_batches_tracked == other.num_batches_tracked == old.num_batches_tracked + 3
    rows = read_rows(family, name)
    for key in ('running_mean', 'running_var'):
        statistic = getattr(one, key)
        torch.testing.assert_close(statistic[rows], getattr(other, key)[rows], rtol=1e-4, atol=1e-4)
        assert not torch.equal(statistic[rows], getattr(old, key)[rows])
        assert torch.equal(statistic[~rows], getattr(old, key)[~rows])
        assert not torch.equal(getattr(other, key)[~rows], getattr(old, key)[~rows])


def site_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(NORMED[name][0])


def inputs_of_site(model: nn.Module, name: str) -> Tensor:
    """What a model gives an attention module; alone, that is not as ill-conditioned as a whole network in training."""
    inputs: Tensor
    twin = copy.deepcopy(model)
    family = CLASSES[name]
    images = family.images().to(next(model.parameters()).dtype)
    ((inputs,), _) = calls_of(twin, {'': site_of(twin, name)}, images)['']
    return inputs


def read_rows(family: Family, name: str) -> Tensor:
    """Which rows are read, as the plan tells."""
    site, child, projection, *_ = NORMED[name]
    plan = sem_timm.plan_model(family.create(), 'external', input_size=family.input_size)
    rows = plan.sliced[f'{site}.{child}.{projection}.weight']
    place = torch.arange(rows.total) % rows.period
    return (place >= rows.first) & (place < rows.last)


@normed
def test_gradients_are_those_of_the_whole_projection(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family).double()
    whole, rows, inputs = with_all_rows(model, name), read_rows(family, name), inputs_of_site(model, name)
    for each in (model, whole):
        site = site_of(each.train(), name)
        # Two batches before one backward pass: statistics move on in between.
        losses = [site(batch).square().mean() for batch in (inputs, inputs.flip(0) ** 2)]
        torch.stack(losses).sum().backward()
    for key, one in packed_child(model, name).named_parameters():
        other = packed_child(whole, name).get_parameter(key)
        torch.testing.assert_close(one.grad, other.grad, msg=key)
        assert one.grad[rows].any() and not one.grad[~rows].any()


@normed
def test_every_new_weight_learns(name: str) -> None:
    model = swapped(CLASSES[name]).train()
    backward(model, CLASSES[name].images())
    assert_all_learn(model)


def assert_as_a_whole(model: nn.Module, whole: nn.Module, family: Family) -> None:
    for training in (False, True):
        found, expected = (outputs(each.train(training), family.images()) for each in (model, whole))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for (key, one), (_, other) in zip(model.named_buffers(), whole.named_buffers()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=key)


@normed
def test_a_norm_that_was_converted_for_distributed_training_is_called_as_a_whole(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    whole = with_all_rows(model, name)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(norm_of(packed_child(model, name))) is nn.SyncBatchNorm
    assert_as_a_whole(model, whole, family)


@normed
def test_hooks_are_called_with_all_rows(name: str) -> None:
    family = CLASSES[name]
    total = NORMED[name][3]
    for place in ('the child', 'its projection', 'its norm'):
        model = swapped(family)
        whole, child = with_all_rows(model, name), packed_child(model, name)
        hooked = {'the child': child, 'its projection': next(child.children()), 'its norm': norm_of(child)}[place]
        seen: list[torch.Size] = []
        hooked.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape))
        found, expected = outputs(model, family.images()), outputs(whole, family.images())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(seen) == 1 and total in seen[0]


@normed
def test_a_fused_projection_computes_the_rows_that_are_read(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    site, *_ = NORMED[name]
    fused = reparameterize_model(model)
    assert type(packed_child(fused, name)) in (nn.Linear, nn.Conv2d)
    torch.testing.assert_close(outputs(fused, family.images()), outputs(model, family.images()), rtol=1e-3, atol=1e-3)
    calls = calls_of(model, {site: model.get_submodule(site)}, family.images())
    assert flops(fused.get_submodule(site), *calls[site]) == flops(model.get_submodule(site), *calls[site])


class Doubled(nn.Module):
    """Somebody's own projection in the place of another one."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.projection, self.norm = old.children()

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        return 2 * (self.norm(x.flatten(0, 1)).view_as(x) if x.ndim == 3 else self.norm(x))


@normed
def test_a_projection_that_was_replaced_is_called_as_a_whole(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    site, path, *_ = NORMED[name]
    whole = with_all_rows(model, name)
    packed_child(whole, name).register_forward_hook(lambda module, args, out: 2 * out)
    parent, _, key = f'{site}.{path}'.rpartition('.')
    setattr(model.get_submodule(parent), key, Doubled(packed_child(model, name)))
    found, expected = outputs(model, family.images()), outputs(whole, family.images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@normed
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    expected = outputs(model, family.images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(twin.state_dict()) == set(model.state_dict())
        assert all(one.equal(other) for one, other in zip(outputs(twin, family.images()), expected))
        outputs(twin.train(), family.images())
        assert norm_of(packed_child(twin, name)).num_batches_tracked == 1
    assert norm_of(packed_child(model, name)).num_batches_tracked == 0


@normed
def test_undo_and_the_keys_of_the_base(name: str) -> None:
    family = CLASSES[name]
    model = family.create()
    before = snapshot(model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    swap(model, input_size=family.input_size)
    after = {key: value.shape for key, value in model.state_dict().items() if '.core' not in key}
    assert after == shapes
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('training', [False, True])
@normed
def test_compile_without_graph_breaks(name: str, training: bool) -> None:
    family = CLASSES[name]
    model = swapped(family)
    site = NORMED[name][0]
    attention = model.get_submodule(site)
    args, kwargs = calls_of(model, {site: attention}, family.images())[site]
    attention = swapped(family).train(training).get_submodule(site)
    twin = copy.deepcopy(attention)
    with torch.no_grad():
        found = torch.compile(twin, fullgraph=True, backend='aot_eager')(*args, **kwargs)
        torch.testing.assert_close(found, attention(*args, **kwargs), rtol=1e-4, atol=1e-4)
    for (key, one), (_, other) in zip(attention.named_buffers(), twin.named_buffers()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=key)


@normed
def test_export(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    with torch.no_grad():
        exported = torch.export.export(
            model, (family.images(),), dynamic_shapes=({0: torch.export.Dim('batch')},), strict=False
        ).module()
        for batch_size in (2, 5):
            images = family.images(batch_size)
            torch.testing.assert_close(tensors(exported(images)), outputs(model, images), rtol=1e-4, atol=1e-4)
