"""Odd forms of residual adds, in small blocks and in timm's own."""

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
from tests.surgery.small_blocks import Copy, Net, Zero, block, left_of
from tests.versions import weightless


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
    with pytest.raises(RefusedError, match=r'test_residual_forms.py:\d+: out\[:, :8\] \+= x  # assigns to an item'):
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


def through_a_child_that_passes_on(self: Any, x: Tensor) -> Any:
    out = self.drop(x)
    out += self.a(x)
    return out


def through_a_child_that_is_called_twice(self: Any, x: Tensor) -> Any:
    kept = self.a(self.drop(x))
    out = self.drop(kept)
    out += x
    return out * kept


def through_a_child_that_changes(self: Any, x: Tensor) -> Any:
    out = self.relu(x)
    return out.add_(self.a(x))


def through_a_child_that_returns_more(self: Any, x: Tensor) -> Any:
    out, new = self.both(x)
    out += self.a(x)
    return out * new


def kept_in_a_list(self: Any, x: Tensor) -> Any:
    out = [x]
    out[0] = out[0] + self.a(x)
    return out[0]


@pytest.mark.parametrize(
    'forward',
    [
        sum_as_a_statement,
        statement_before_the_sum,
        functional_statement_before_the_sum,
        on_the_shortcut,
        sum_used_twice,
        through_a_child_that_passes_on,
        through_a_child_that_is_called_twice,
        through_a_child_that_changes,
        through_a_child_that_returns_more,
        kept_in_a_list,
    ],
)
@pytest.mark.parametrize('operation', ['sem', Copy])
def test_changes_in_place(forward: Callable[..., Any], operation: Any) -> None:
    base, model = block(forward), Net(block(forward))
    model.block.load_state_dict(base.state_dict())
    try:
        plan = sem_timm.plan_model(model, operation, target='block', input_size=(3, 8, 8))
    except RefusedError as refusal:
        assert f'Block_{forward.__name__}' in str(refusal) and 'computes something else' in str(refusal)
        return
    assert len(plan) == 1
    sem_timm.patch_model(model, operation, target='block', input_size=(3, 8, 8))
    assert sem_timm.patched_modules(model)[0].inserted
    x = torch.randn(2, 8, 8, 8)
    first, second = x.clone(), x.clone()
    with torch.no_grad():
        assert torch.equal(base(first), model.block(second))
    assert torch.equal(first, second)  # what the forward does to its argument, the patched one does too


class Asks(nn.Module):
    """Has a method that returns what it is given in training only, and changes the result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def part(self, x: Tensor) -> Tensor:
        return x if self.training else x * 2

    def forward(self, x: Tensor) -> Tensor:
        kept = self.a(x)
        out = self.part(kept)
        out += x
        return out * kept


def test_changes_in_place_of_what_a_method_returns_in_training() -> None:
    with pytest.raises(RefusedError, match='computes something else'):
        sem_timm.plan_model(Net(Asks()), target='block', position='residual', input_size=(3, 8, 8))


class Flat(nn.Module):
    """Returns a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class CopiesInEval(nn.Module):
    """Returns what it is given, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x.clone()


class Twice(nn.Module):
    """Returns parts of one tensor; two of them are the same, and the third is another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layer(x)
        return x[:, :8], x[:, :8].transpose(2, 3), x[:, 8:16]


class ChangesOneOfThree(nn.Module):
    """Changes one of the tensors that its child returns in place, and reads another."""

    def __init__(self, changed: int) -> None:
        super().__init__()
        self.child, self.changed = Twice(), changed

    def forward(self, x: Tensor) -> Tensor:
        parts = self.child(x)
        part = parts[self.changed]
        part += 1
        return x + parts[0] * 2


def test_changes_in_place_of_what_a_child_returns_twice() -> None:
    options: dict[str, Any] = {'target': 'block', 'position': 'residual', 'input_size': (3, 8, 8)}
    assert len(sem_timm.plan_model(Net(ChangesOneOfThree(2)), **options)) == 1
    with pytest.raises(RefusedError, match='computes something else'):
        sem_timm.plan_model(Net(ChangesOneOfThree(1)), **options)


class Changes(nn.Module):
    """Changes what a child returned in place, and reads what the child was given."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.child = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), child

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(x)
        y = self.child(x)
        y += 1
        return x + self.a(x) * y.mean()


@pytest.mark.parametrize('child', [Flat(), CopiesInEval()])
def test_changes_in_place_of_what_a_child_shows(child: nn.Module) -> None:
    with pytest.raises(RefusedError, match='computes something else'):
        sem_timm.plan_model(Net(Changes(child)), target='block', position='residual', input_size=(3, 8, 8))


class Tracks(nn.Module):
    """Keeps a mean of what it sees, in a buffer that it changes under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)
        self.register_buffer('mean', torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean: Any = self.mean
            mean *= 0.9
        return x + self.a(x)


def test_a_buffer_that_is_changed_in_place_and_not_used() -> None:
    with pytest.raises(RefusedError, match='computes something else'):
        sem_timm.plan_model(Net(Tracks()), target='block', position='residual', input_size=(3, 8, 8))


class Listed(nn.Module):
    """Has its children twice: by name, and in the list that its forward goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.layers = nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y


class Kept(Listed):
    """Has its children in a plain list as well."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers
        self.layers = [self.a, self.b]  # type: ignore[assignment]


@pytest.mark.parametrize('block', [Listed(), Kept()])
def test_children_that_are_in_two_places(block: nn.Module) -> None:
    plan = sem_timm.plan_model(Net(block), target='block', position='residual', input_size=(3, 8, 8))
    assert [site.name for site in plan] == ['block']


class Counts(nn.Module):
    """Has a method that counts the children, or their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def part(self, x: Tensor) -> Tensor:
        return x * len(list(self.children()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.part(x))


class CountsParameters(Counts):
    def part(self, x: Tensor) -> Tensor:
        return x * len(list(self.parameters()))


class CountsKeys(Counts):
    def part(self, x: Tensor) -> Tensor:
        return x * len(self.state_dict())


@pytest.mark.parametrize('block', [Counts(), CountsParameters(), CountsKeys()])
def test_a_method_that_goes_through_the_children(block: nn.Module) -> None:
    with pytest.raises(RefusedError, match='a method of it goes through its children'):
        sem_timm.plan_model(Net(block), target='block', position='residual', input_size=(3, 8, 8))


def lends_its_type(self: Any, x: Tensor) -> Any:
    out = x + self.b(x)
    return self.a(x).to(out.dtype)


def test_a_sum_of_which_only_the_type_is_used_is_no_site() -> None:
    with pytest.raises(RefusedError, match='no residual add'):
        sem_timm.plan_model(Net(block(lends_its_type)), target='block', position='residual', input_size=(3, 8, 8))


def returns_its_input(self: Any, x: Tensor) -> Any:
    return self.drop(x)


def returns_one_tensor_twice(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    return out, out


@pytest.mark.parametrize('forward', [returns_its_input, returns_one_tensor_twice])
def test_an_output_that_others_hold_is_no_site(forward: Callable[..., Any]) -> None:
    with pytest.raises(RefusedError, match='who changes the one changes the other'):
        sem_timm.plan_model(Net(block(forward)), target='block', input_size=(3, 8, 8))


def changed_afterwards(self: Any, x: Tensor) -> Any:
    return self.b(self.drop(self.a(x)).mul_(2))


def read_beside(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    self.drop(out).mul_(2)
    return out + x


def read_by_what_follows(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    return self.drop(out).mul_(2) + out


def shown_of_another(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    self.drop(out[:, :4]).mul_(2)
    return self.b(out)


def shown_later(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    same = out.view_as(out)
    self.drop(same).mul_(2)
    return self.b(out)


def called_twice(self: Any, x: Tensor) -> Any:
    return self.drop(self.b(self.drop(self.a(x))))


def test_an_identity_that_alone_is_given_a_tensor_is_a_site() -> None:
    model, images = Net(block(changed_afterwards)).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        sem_timm.patch_model(model, 'ssf', target='block.drop', position='output', input_size=(3, 8, 8))
        assert torch.equal(model(images), expected)
        added: Any = model.get_submodule('block.drop.ssf')
        added.scale.fill_(2.0)
        torch.testing.assert_close(
            model(images) - model.block.b(torch.zeros(2, 8, 8, 8)),
            2 * (expected - model.block.b(torch.zeros(2, 8, 8, 8))),
        )


@pytest.mark.parametrize(
    'forward', [returns_its_input, read_beside, read_by_what_follows, shown_of_another, shown_later, called_twice]
)
def test_an_identity_whose_input_others_see_is_no_site(forward: Callable[..., Any]) -> None:
    model = Net(block(forward))
    with pytest.raises(RefusedError, match=r'who changes the one changes the other|calls it 2 times'):
        sem_timm.plan_model(model, 'ssf', target='block.drop', position='output', input_size=(3, 8, 8))


def change_after_the_sum(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    same = self.drop(out)
    total = x + same
    out.mul_(2)
    return total


def test_what_changes_after_the_sum_is_no_branch() -> None:
    """The new module keeps the branch for its gradient."""
    with pytest.raises(RefusedError, match='no residual add'):
        sem_timm.plan_model(Net(block(change_after_the_sum)), target='block', position='residual', input_size=(3, 8, 8))


def plus(self: Any, x: Tensor) -> Any:
    return x + self.a(x)


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
    sem_timm.patch_model(model, sem_timm.InsertConfig(Zero, position='residual'), target='block', input_size=(3, 8, 8))
    x, shortcut = torch.randn(2, 2, 8, 8, 8)
    if given:
        assert torch.equal(model.block(x, shortcut), shortcut)
        assert torch.equal(model.block(x, shortcut=shortcut), shortcut)
    else:
        assert torch.equal(model.block(x), x)


# timm's own


@pytest.mark.parametrize('architecture', ['repvgg_a0', 'mobileone_s0'])
def test_sums_of_parallel_convolutions_are_no_residual_adds(architecture: str) -> None:
    model = weightless(architecture)
    assert {site.position for site in sem_timm.plan_model(model)} == {'output'}
    with pytest.raises(RefusedError, match='no residual add'):
        sem_timm.plan_model(model, position='residual')


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('resnet', {'residual'}),
        ('dla', {'residual'}),
        ('rexnet', {'residual', 'output'}),
        ('densenet', {'output'}),
        ('vgg', {'output'}),
    ],
)
def test_blocks_without_a_shortcut_are_taken_as_a_whole(name: str, expected: set[str]) -> None:
    family = FAMILIES[name]
    plan = sem_timm.plan_model(family.create(), input_size=family.input_size)
    assert {site.position for site in plan} == expected


def test_blocks_with_a_dense_and_a_residual_path() -> None:
    torch.manual_seed(0)
    model = timm.create_model('dpn48b', num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        sem_timm.patch_model(model, input_size=(3, 64, 64))
        assert torch.equal(before, model(images))
    # The stem is no block, although timm's pattern for blocks matches its first convolution too.
    assert {(site.class_name, site.position) for site in sem_timm.patched_modules(model)} == {
        ('DualPathBlock', 'residual')
    }


def test_blocks_that_return_tuples() -> None:
    model = timm.create_model('tnt_s_patch16_224', img_size=64, num_classes=10, depth=2).eval()
    plan = sem_timm.plan_model(model)
    # One path holds 16 image patches of pixels each, the other 16 patches and a class token.
    assert [site.name for site in plan if site.shape[1:] == (17, 384)] == ['blocks.0', 'blocks.1']
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
