"""What is a residual add and what only looks like one.

A module that returns zeros is inserted in the residual branches of small blocks; what is left of the block's output
shows which operand was taken for the branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sem_timm
from sem_timm import RefusedError
from tests.families import FAMILIES


class Zero(nn.Module):
    """Returns zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Net(nn.Module):
    """A stem and one block, on 8 channels."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block(self.stem(x))


class Block(nn.Module):
    """Some layers; each block below adds them up in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        self.narrow = nn.Conv2d(8, 8, 1)
        self.wide = nn.Conv2d(8, 12, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.position = nn.Parameter(torch.rand(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Any:
        return x

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def branch_and_sum(self, x: Tensor) -> Tensor:
        return self.added(x, self.a(x))


def helper(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def block(forward: Callable[..., Any]) -> nn.Module:
    """A block with this forward; its class has a name of its own, as classes that differ have."""
    return type(f'Block_{forward.__name__}', (Block,), {'forward': forward})().eval()


def left_of(forward: Callable[..., Any], x: Tensor, **options: Any) -> tuple[Any, nn.Module, int]:
    """The output without the branches, the block, and the number of sites."""
    model = Net(block(forward))
    sem_timm.patch_model(
        model, sem_timm.InsertConfig(Zero, position='residual', **options), target='block', input_size=(3, 8, 8)
    )
    (site,) = sem_timm.patched(model)
    with torch.no_grad():
        return model.block(x.clone()), model.block, len(site.inserted)


# fmt: off
def plus(self: Any, x: Tensor) -> Tensor: return x + self.a(x)
def plus_on_the_right(self: Any, x: Tensor) -> Tensor: return self.a(x) + x
def torch_add(self: Any, x: Tensor) -> Tensor: return torch.add(x, self.a(x))
def torch_add_by_keyword(self: Any, x: Tensor) -> Tensor: return torch.add(self.a(x), other=x)
def add_method(self: Any, x: Tensor) -> Tensor: return self.a(x).add(x)
def add_in_place(self: Any, x: Tensor) -> Tensor: return self.a(x).add_(x)
def scaled_branch(self: Any, x: Tensor) -> Tensor: return x + self.scale * self.a(x)
def scaled_by_a_number(self: Any, x: Tensor) -> Tensor: return x + 0.2 * self.a(x)
def activation_after(self: Any, x: Tensor) -> Tensor: return (x + self.a(x)).relu()
def added_in_a_method(self: Any, x: Tensor) -> Tensor: return self.added(x, self.a(x))
def all_in_a_method(self: Any, x: Tensor) -> Tensor: return self.branch_and_sum(x)
def added_in_a_function(self: Any, x: Tensor) -> Tensor: return helper(x, self.a(x))
def added_by_sum(self: Any, x: Tensor) -> Tensor: return sum((x, self.a(x)))
def parallel_branches(self: Any, x: Tensor) -> Tensor: return x + (self.a(x) + self.b(x))
def twice_through_one_layer(self: Any, x: Tensor) -> Tensor: return x + self.a(self.a(x))
def keyword_only(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor: return x + self.a(x)
# fmt: on


def plus_in_place(self: Any, x: Tensor) -> Tensor:
    out = self.a(x)
    out += x
    return out


def shortcut_kept_first(self: Any, x: Tensor) -> Tensor:
    shortcut = x
    x = self.a(x)
    x = x.relu()
    return x + shortcut


@pytest.mark.parametrize(
    'forward',
    [
        plus,
        plus_on_the_right,
        torch_add,
        torch_add_by_keyword,
        add_method,
        add_in_place,
        scaled_branch,
        scaled_by_a_number,
        added_in_a_method,
        all_in_a_method,
        added_in_a_function,
        added_by_sum,
        parallel_branches,
        twice_through_one_layer,
        keyword_only,
        plus_in_place,
        shortcut_kept_first,
    ],
)
@pytest.mark.parametrize('branches', ['last', 'all'])
def test_without_its_branch_a_block_is_its_shortcut(forward: Callable[..., Any], branches: str) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, _, count = left_of(forward, x, branches=branches)
    # Of parallel branches of different depth, one could pass for a projection of the other.
    assert count == 1 or forward is parallel_branches
    assert torch.equal(left, x)


def test_what_follows_the_sum_stays() -> None:
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(left_of(activation_after, x)[0], x.relu())


def two_in_a_row(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(x)
    x = x + self.b(x)
    return x


def test_of_two_in_a_row_the_last_or_all() -> None:
    x = torch.randn(2, 8, 8, 8)
    left, module, count = left_of(two_in_a_row, x)
    assert count == 1 and torch.equal(left, x + module.a(x))
    left, _, count = left_of(two_in_a_row, x, branches='all')
    assert count == 2 and torch.equal(left, x)


def three_summands(self: Any, x: Tensor) -> Tensor:
    return x + self.b(x) + self.a(x)


def three_summands_the_deeper_last(self: Any, x: Tensor) -> Tensor:
    return x + self.a(x) + self.b(x)


@pytest.mark.parametrize('forward', [three_summands, three_summands_the_deeper_last])
def test_a_sum_with_the_shortcut_in_it_is_no_branch(forward: Callable[..., Any]) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, _, count = left_of(forward, x, branches='all')
    assert count == 2 and torch.equal(left, x)
    left, module, count = left_of(forward, x)
    last = module.b(x) if forward is three_summands else module.a(x)
    assert count == 1 and torch.equal(left, x + last)


# Projections and sums of parallel layers


def projection(self: Any, x: Tensor) -> Tensor:
    return self.b(x) + self.narrow(x)


def optional_projection(self: Any, x: Tensor) -> Tensor:
    shortcut = self.narrow(x) if self.narrow is not None else x
    return self.b(x) + shortcut


@pytest.mark.parametrize('forward', [projection, optional_projection])
def test_a_projection_shortcut_is_the_operand_of_fewer_layers(forward: Callable[..., Any]) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, module, count = left_of(forward, x)
    assert count == 1 and torch.equal(left, module.narrow(x))


# fmt: off
def parallel_layers(self: Any, x: Tensor) -> Tensor: return self.a(x) + self.narrow(x)
def position_embedding(self: Any, x: Tensor) -> Tensor: return self.a(x + self.position)
def position_embedding_added_last(self: Any, x: Tensor) -> Tensor: return self.a(x) + self.position
def number(self: Any, x: Tensor) -> Tensor: return self.a(x) + 1
def size(self: Any, x: Tensor) -> Tensor: return self.a(x) + x.shape[0]
def doubled(self: Any, x: Tensor) -> Tensor: return self.a(x + x)
def weighted(self: Any, x: Tensor) -> Tensor: return torch.add(x, self.a(x), alpha=2)
def difference(self: Any, x: Tensor) -> Tensor: return x - self.a(x)
def broadcast(self: Any, x: Tensor) -> Tensor: return x + self.a(x).mean((2, 3), keepdim=True)
def stacked(self: Any, x: Tensor) -> Tensor: return torch.stack((x, self.a(x))).sum(0)
def untouched(self: Any, x: Tensor) -> Tensor: return self.a(x + x.relu())
# fmt: on


def logits_and_a_bias(self: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    weights = self.a(x).flatten(2) @ tokens.transpose(1, 2)
    weights = weights + self.scale.flatten()
    return (weights.softmax(-1) @ tokens).reshape(x.shape)


def mask(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = self.a(x)
    return x if mask is None else x + mask


def gate_of_the_input(self: Any, x: Tensor) -> Tensor:
    return x * (1 + self.a(x).sigmoid())


@pytest.mark.parametrize(
    'forward',
    [
        parallel_layers,
        position_embedding,
        position_embedding_added_last,
        number,
        size,
        doubled,
        weighted,
        difference,
        broadcast,
        stacked,
        untouched,
        logits_and_a_bias,
        mask,
        gate_of_the_input,
    ],
)
def test_other_sums_are_none(forward: Callable[..., Any]) -> None:
    model = Net(block(forward))
    with pytest.raises(RefusedError, match='no residual add'):
        sem_timm.plan_model(model, target='block', position='residual', input_size=(3, 8, 8))
    if forward not in (stacked, logits_and_a_bias):  # those end in a reshape that hides which axis the channels are on
        # Such a block is not left out: it is taken as a whole.
        assert [s.position for s in sem_timm.plan_model(model, target='block', input_size=(3, 8, 8))] == ['output']


# Odd forms


def partial(self: Any, x: Tensor) -> Tensor:
    out = self.wide(x)
    return torch.cat((out[:, :8] + x, out[:, 8:]), dim=1)


def partial_in_place(self: Any, x: Tensor) -> Tensor:
    out = self.wide(x)
    out[:, :8] += x  # assigns to an item
    return out


def test_a_shortcut_to_some_of_the_channels() -> None:
    x = torch.randn(2, 8, 8, 8)
    left, _, count = left_of(partial, x)
    assert count == 1 and torch.equal(left, torch.cat((x, torch.zeros(2, 4, 8, 8)), dim=1))
    model = Net(block(partial))
    (site,) = sem_timm.plan_model(model, target='block', position='residual', input_size=(3, 8, 8))
    assert site.channels == 12
    with pytest.raises(RefusedError, match=r'test_residual.py:\d+: out\[:, :8\] \+= x  # assigns to an item'):
        sem_timm.plan_model(Net(block(partial_in_place)), target='block', position='residual', input_size=(3, 8, 8))


# fmt: off
def a_tuple(self: Any, x: Tensor) -> Any: return x + self.a(x), x.relu() + self.b(x)
def a_list(self: Any, x: Tensor) -> Any: return [x + self.a(x), x.relu() + self.b(x)]
def a_dictionary(self: Any, x: Tensor) -> Any: return {'first': x + self.a(x), 'second': x.relu() + self.b(x)}
def nested(self: Any, x: Tensor) -> Any: return x + self.a(x), {'second': [x.relu() + self.b(x)]}
# fmt: on


@pytest.mark.parametrize('forward', [a_tuple, a_list, a_dictionary, nested])
def test_one_branch_for_each_output(forward: Callable[..., Any]) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, _, count = left_of(forward, x)
    assert type(left) is type(block(forward)(x))
    first, second = tree_leaves(left)
    assert count == 2 and torch.equal(first, x) and torch.equal(second, x.relu())


# Changes in place


def sum_as_a_statement(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    out.add_(x)
    return out


def statement_before_the_sum(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    out.mul_(2)
    return out + x


def functional_statement_before_the_sum(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    nn.functional.relu(out, inplace=True)
    out += x
    return out


def on_the_shortcut(self: Any, x: Tensor) -> Any:
    x += self.a(x)
    return x


def sum_used_twice(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    total = out.add_(x)
    return total * out


def kept_in_a_list(self: Any, x: Tensor) -> Any:
    out = [x]
    out[0] = out[0] + self.a(x)
    return out[0]


class Copy(nn.Module):
    """An identity that, as all layers do, returns a new tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


@pytest.mark.parametrize(
    'forward',
    [
        sum_as_a_statement,
        statement_before_the_sum,
        functional_statement_before_the_sum,
        on_the_shortcut,
        sum_used_twice,
        kept_in_a_list,
    ],
)
@pytest.mark.parametrize('operation', ['sem', Copy])
def test_changes_in_place(forward: Callable[..., Any], operation: Any) -> None:
    base, model = block(forward), Net(block(forward))
    model.block.load_state_dict(base.state_dict())
    assert len(sem_timm.plan_model(model, operation, target='block', input_size=(3, 8, 8))) == 1
    sem_timm.patch_model(model, operation, target='block', input_size=(3, 8, 8))
    assert sem_timm.patched(model)[0].inserted
    x = torch.randn(2, 8, 8, 8)
    first, second = x.clone(), x.clone()
    with torch.no_grad():
        assert torch.equal(base(first), model.block(second))
    assert torch.equal(first, second)  # what the forward does to its argument, the patched one does too


def test_one_block_that_cannot_be_rewritten_does_not_stop_the_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block(on_the_shortcut), block(plus))
    plan = sem_timm.plan_model(model, input_size=(3, 8, 8))
    assert {site.name: site.position for site in plan}['2'] == 'residual'
    plan = sem_timm.plan_model(model, position='residual', input_size=(3, 8, 8))
    assert [site.name for site in plan] in (['2'], ['1', '2'])
    assert len(plan) + len(plan.refusals) == 2


class WithShortcut(nn.Module):
    """Hands its block a shortcut, as DLA does."""

    def __init__(self, given: bool) -> None:
        super().__init__()
        self.given = given
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.project = nn.Conv2d(8, 8, 1)

        def forward(self: Any, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
            if shortcut is None:
                shortcut = x
            return self.b(x) + shortcut

        self.block = block(forward)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.block(x, self.project(x)) if self.given else self.block(x)


@pytest.mark.parametrize('given', [True, False])
def test_a_shortcut_that_is_an_argument(given: bool) -> None:
    model = WithShortcut(given)
    sem_timm.patch_model(
        model, sem_timm.InsertConfig(Zero, position='residual'), target='block', input_size=(3, 8, 8)
    )
    x, shortcut = torch.randn(2, 2, 8, 8, 8)
    if given:
        assert torch.equal(model.block(x, shortcut), shortcut)
        assert torch.equal(model.block(x, shortcut=shortcut), shortcut)
    else:
        assert torch.equal(model.block(x), x)


# timm's own


@pytest.mark.parametrize('architecture', ['repvgg_a0', 'mobileone_s0'])
def test_sums_of_parallel_convolutions_are_no_residual_adds(architecture: str) -> None:
    model = timm.create_model(architecture, device='meta')
    assert {site.position for site in sem_timm.plan_model(model)} == {'output'}
    with pytest.raises(RefusedError, match='no residual add'):
        sem_timm.plan_model(model, position='residual')


@pytest.mark.parametrize('name', ['resnet', 'rexnet', 'dla', 'densenet', 'vgg'])
def test_timm_blocks_lose_their_branch(name: str) -> None:
    family = FAMILIES[name]
    plan = sem_timm.plan_model(family.create(), input_size=family.input_size)
    positions = {site.position for site in plan}
    assert positions == {'resnet': {'residual'}, 'dla': {'residual'}, 'rexnet': {'residual', 'output'}}.get(name, {'output'})
    if name == 'rexnet':
        wider = [s for s in plan if s.position == 'residual' and 'shortcut' in plan.code(s.name)]
        assert not wider or all(site.channels == site.shape[1] for site in wider)


def test_blocks_with_a_dense_and_a_residual_path() -> None:
    torch.manual_seed(0)
    model = timm.create_model('dpn48b', num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        sem_timm.patch_model(model, input_size=(3, 64, 64))
        assert torch.equal(before, model(images))
    # The stem is no block, although timm's pattern for blocks matches its first convolution too.
    assert {(site.class_name, site.position) for site in sem_timm.patched(model)} == {('DualPathBlock', 'residual')}


def test_blocks_that_return_tuples() -> None:
    model = timm.create_model('tnt_s_patch16_224', img_size=64, num_classes=10, depth=2).eval()
    plan = sem_timm.plan_model(model)
    assert [(site.name, site.attribute, site.shape[1]) for site in plan] == [
        (f'blocks.{n}', attribute, tokens) for n in range(2) for attribute, tokens in (('sem1', 16), ('sem2', 17))
    ]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(before, sem_timm.patch_model(model, plan)(images))


def test_two_branches_of_a_transformer() -> None:
    model = FAMILIES['vit_registers'].create()
    plan = sem_timm.plan_model(model, branches='all')
    assert [site.attribute for site in plan] == ['sem1', 'sem2'] * len(model.blocks)
    code = plan.code('blocks.0')
    assert code.index('self.attn(') < code.index('self.sem1(') < code.index('self.mlp(') < code.index('self.sem2(')
