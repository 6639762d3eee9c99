"""Bad input to swaps: an error that says what was asked, what exists and what to do, and an unchanged model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sem_timm
from sem_timm import AttentionConfig, NoMatchError, OptionError, RefusedError
from tests.families import FAMILIES
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES
from tests.swap.swapping import outputs, swap, swapped
from tests.versions import Attention, AttentionRope

VIT = CLASSES['layers.attention.Attention']
CALLS = pytest.mark.parametrize('call', [sem_timm.plan_model, sem_timm.patch_model], ids=['plan', 'patch'])

OPTIONS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    'name': ('externel', {}, ("'externel' is unknown", 'external')),
    'name_in_capitals': ('EAMLP', {}, ("'EAMLP' is unknown", 'There are: sem')),
    'attention_of_a_configuration': (
        AttentionConfig,
        {'attention': 'eficient'},
        ("'eficient' is unknown", 'efficient'),
    ),
    'option': ('external', {'memroy': 8}, ("option 'memroy'", "'external'", 'memory')),
    'option_of_another_attention': ('external', {'halo_size': 3}, ("option 'halo_size'", "'external'", 'memory')),
    'option_of_another_attention_2': ('efficient', {'memory': 3}, ("option 'memory'", "'efficient'")),
    'option_that_the_site_decides': ('external', {'head_dim': 8}, ("option 'head_dim'", "'external'")),
    'option_of_insertions': ('external', {'position': 'output'}, ("option 'position'", "'external'")),
    'memory_zero': ('external', {'memory': 0}, ('memory=0', '1 or more')),
    'memory_negative': ('external', {'memory': -64}, ('memory=-64', '1 or more')),
    'memory_fraction': ('external', {'memory': 6.5}, ('memory=6.5', 'whole number')),
    'memory_true': ('external', {'memory': True}, ('memory=True', 'whole number')),
    'memory_text': ('external', {'memory': '64'}, ("memory='64'", 'whole number')),
    'memory_none': ('external', {'memory': None}, ('memory=None', 'whole number')),
    'norm': ('external', {'norm': 'doubel'}, ("norm='doubel'", 'double')),
    'block_size': ('halo', {'block_size': 0}, ('block_size=0', '1 or more')),
    'halo_size': ('halo', {'halo_size': -1}, ('halo_size=-1', '0 or more')),
    'dictionary': ('catt', {'dictionary': 0}, ('dictionary=0', '1 or more')),
    'init_of_a_dictionary': ('catt', {'init': 'identitty'}, ("init='identitty'", 'identity')),
    'dropout': ('eamlp', {'attn_drop': 1.5}, ("'eamlp'", 'attn_drop', '1.5', 'between 0 and 1')),
    'configuration_and_options': (AttentionConfig('external'), {'memory': 8}, ('memory', 'AttentionConfig(memory=')),
}


@CALLS
@pytest.mark.parametrize('case', OPTIONS)
def test_options(case: str, call: Any) -> None:
    operation, options, parts = OPTIONS[case]
    model = VIT.create()
    with refused(model, OptionError, *parts):
        call(model, operation, **options)


@pytest.mark.parametrize('attention', [3, None, nn.ReLU, nn.ReLU()])
def test_what_is_no_attention(attention: Any) -> None:
    with pytest.raises(OptionError, match='neither a name nor a subclass of AttentionCore'):
        AttentionConfig(attention)


TARGETS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    'matches_nothing': (
        {'target': r'blocks\.9\..*'},
        NoMatchError,
        ("target 'blocks", 'VisionTransformer', 'blocks.5'),
    ),
    'one_entry_of_several': (
        {'target': ['blocks.0.attn', 'blocks.9.attn']},
        NoMatchError,
        ("target 'blocks.9.attn'", 'blocks.5.attn'),
    ),
    'class_that_is_not_there': ({'target': AttentionRope}, NoMatchError, (AttentionRope.__name__, 'VisionTransformer')),
    'block': (
        {'target': 'blocks.0'},
        RefusedError,
        ("target 'blocks.0'", 'its own forward has no attention core; blocks.0.attn may have one'),
    ),
    'no_attention': ({'target': 'blocks.0.mlp'}, RefusedError, ("target 'blocks.0.mlp'", 'no attention core')),
    'one_entry_without_attention': (
        {'target': ['blocks.0.attn', 'blocks.1.mlp']},
        RefusedError,
        ("target 'blocks.1.mlp'", 'no attention core'),
    ),
    'layer_of_torch': ({'target': 'head'}, RefusedError, ("target 'head'", 'no attention core')),
    'exclude_matches_nothing': ({'exclude': r'layers\..*'}, NoMatchError, ("exclude 'layers", 'VisionTransformer')),
    'exclude_of_everything': ({'exclude': r'blocks\.\d\.attn'}, RefusedError, ('VisionTransformer', 'exclude')),
    'number': ({'target': 3}, OptionError, ('target=3', 'regular expression', 'list of names')),
}


@CALLS
@pytest.mark.parametrize('case', TARGETS)
def test_targets(case: str, call: Any) -> None:
    options, error, parts = TARGETS[case]
    model = VIT.create()
    with refused(model, error, *parts):
        call(model, 'external', **options)


def test_targets_that_select_some() -> None:
    model = VIT.create()
    for target, expected in (
        (r'blocks\.[02]\..*', ['blocks.0.attn', 'blocks.2.attn']),
        (['blocks.1.attn', 'blocks.3.attn'], ['blocks.1.attn', 'blocks.3.attn']),
        (Attention, [f'blocks.{n}.attn' for n in range(6)]),
        (lambda name, module: name == 'blocks.4.attn', ['blocks.4.attn']),
    ):
        assert [site.name for site in sem_timm.plan_model(model, 'external', target=target)] == expected
    plan = sem_timm.plan_model(model, 'external', target=Attention, exclude=r'blocks\.[1-5]\..*')
    assert [site.name for site in plan] == ['blocks.0.attn']


@CALLS
@pytest.mark.parametrize('name', ['resnet', 'mixer', 'convnext'])
def test_models_without_attention(name: str, call: Any) -> None:
    model = FAMILIES[name].create()
    with refused(model, RefusedError, f'nothing in {type(model).__name__} can take external', 'no attention'):
        call(model, 'external', input_size=FAMILIES[name].input_size)


@pytest.mark.parametrize('operation', ['external', 'eamlp', 'linear'])
def test_a_module_that_is_swapped_already(operation: str) -> None:
    model = swapped(VIT, target='blocks.0.attn')
    with refused(model, RefusedError, "target 'blocks.0.attn'", 'already patched (external)', 'unpatch_model(model)'):
        sem_timm.patch_model(model, operation, target='blocks.0.attn')
    plan = sem_timm.plan_model(model, operation)
    assert [site.name for site in plan] == [f'blocks.{n}.attn' for n in range(1, 6)]
    assert [refusal.name for refusal in plan.refusals] == ['blocks.0.attn']
    swap(model, plan)
    with refused(model, RefusedError, 'VisionTransformer', 'blocks.0.attn: it is already patched (external)'):
        sem_timm.patch_model(model, operation)


def test_what_was_put_into_a_model_is_no_attention_of_the_model() -> None:
    model = swapped(VIT, 'catt', target='blocks.0.attn')
    plan = sem_timm.plan_model(model, 'external')
    assert not any('core' in entry.name for entry in (*plan.sites, *plan.refusals))


def test_swaps_beside_insertions() -> None:
    """Each attention of a model may be another one, and blocks may have SEM too; one undo takes all back."""
    model, images = VIT.create(), VIT.images()
    before, expected = snapshot(model), outputs(model, images)[0]
    swap(model, 'external', target='blocks.0.attn')
    swap(model, 'efficient', target='blocks.1.attn')
    swap(model, 'eamlp', target='blocks.2.attn')
    changed = outputs(model, images)[0]
    sem_timm.patch_model(model, 'sem')
    assert torch.equal(changed, outputs(model, images)[0])
    names = {m.name: (str(m.operation), m.position) for m in sem_timm.patched_modules(model)}
    assert [names[f'blocks.{n}.attn'][0] for n in range(3)] == ['external', 'efficient', 'eamlp']
    assert names['blocks.0'] == ('sem', 'residual') and names['blocks.0.attn'][1] == 'core'
    sem_timm.unpatch_model(model)
    assert torch.equal(expected, outputs(model, images)[0])
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


class FailsOnTheThird(sem_timm.ExternalAttention):
    """A core that cannot be built a third time on a real device."""

    built = 0

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.mk.is_meta:
            FailsOnTheThird.built += 1
            if FailsOnTheThird.built % 3 == 0:
                raise MemoryError('no more, say')


class FailsToScale(sem_timm.ExternalAttention):
    """A core that fails when its scale is set."""

    def scale_output(self, factor: float) -> None:
        raise ArithmeticError('no number, say')


@pytest.mark.parametrize(('core', 'error'), [(FailsOnTheThird, MemoryError), (FailsToScale, ArithmeticError)])
def test_a_swap_that_fails_half_way_leaves_everything_as_it_was(core: Any, error: type[Exception]) -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']  # with parameters that a swap freezes
    model = family.create()
    before = snapshot(model)
    with pytest.raises(error, match='say'):
        sem_timm.patch_model(model, core, input_size=family.input_size)
    assert_same(before, snapshot(model))


class WrongShape(sem_timm.ExternalAttention):
    """A core whose output has a channel too many."""

    def forward(self, q: Any, attn_mask: Any = None) -> Any:
        return torch.cat((q, q[..., :1]), -1)


def test_a_core_that_does_not_fit() -> None:
    model = VIT.create()
    with refused(model, RefusedError, 'WrongShape', '(2, 2, 17, 33)', '(2, 2, 17, 32)'):
        sem_timm.patch_model(model, WrongShape)
