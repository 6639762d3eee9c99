"""Bad input: an error that says what was asked, what exists and what to do, and a model that nothing happened to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import sem_timm
from sem_timm import GuardError, ModelError, NoMatchError, OptionError, PlanError, RefusedError, TraceError
from sem_timm.errors import place_of
from tests.families import FAMILIES
from tests.refusals import refused


def resnet() -> nn.Module:
    return FAMILIES['resnet'].create()


def planned_or_patched(model: nn.Module, patch: bool, *args: Any, **options: Any) -> Any:
    return (sem_timm.patch_model if patch else sem_timm.plan_model)(model, *args, **options)


TARGETS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    'matches_nothing': (
        {'target': r'layer5\..*'},
        NoMatchError,
        ("target 'layer5", 'ResNet', 'layer4', 'plan_model(model)'),
    ),
    'one_entry_of_several': (
        {'target': ['layer1.0', 'layer3.7', 'layer4.0']},
        NoMatchError,
        ("target 'layer3.7'", 'layer3.0', 'plan_model(model)'),
    ),
    'suffix_without_its_dot': ({'target': ['ayer1.0']}, NoMatchError, ("target 'ayer1.0'", 'layer1.0')),
    'part_of_a_name': ({'target': 'layer'}, NoMatchError, ("target 'layer'", 'layer1')),
    'class_that_is_not_there': ({'target': nn.MultiheadAttention}, NoMatchError, ('MultiheadAttention', 'ResNet')),
    'callable_that_selects_nothing': ({'target': lambda name, module: False}, NoMatchError, ('lambda', 'ResNet')),
    'takes_no_sem': (
        {'target': 'fc'},
        RefusedError,
        ("target 'fc'", 'can take no sem', 'fc: ', 'no positions', '(B, 10)'),
    ),
    'one_entry_takes_no_sem': ({'target': ['layer1.0', 'fc']}, RefusedError, ("target 'fc'", 'no positions')),
    'invalid_pattern': ({'target': 'layer(1'}, OptionError, ("target='layer(1'", 'regular expression', 'position 5')),
    'number': ({'target': 3}, OptionError, ('target=3', 'regular expression', 'list of names', "target=r'layer")),
    'list_of_numbers': ({'target': [1, 2]}, OptionError, ('target=[1, 2]', 'list of names')),
    'empty_list': ({'target': []}, OptionError, ('target=[]', 'list of names')),
    'exclude_matches_nothing': ({'exclude': 'layer9'}, NoMatchError, ("exclude 'layer9'", 'layer1')),
    'exclude_invalid_pattern': ({'exclude': '*'}, OptionError, ("exclude='*'", 'regular expression')),
    'exclude_of_everything': ({'exclude': r'layer\d.*'}, RefusedError, ('ResNet', 'sem', 'exclude')),
    'exclude_of_the_target': (
        {'target': r'layer1\..*', 'exclude': r'layer1\..*'},
        RefusedError,
        ("target 'layer1", 'excluded'),
    ),
}


@pytest.mark.parametrize('patch', [False, True], ids=['plan', 'patch'])
@pytest.mark.parametrize('case', TARGETS)
def test_targets(case: str, patch: bool) -> None:
    options, error, parts = TARGETS[case]
    model = resnet()
    with refused(model, error, *parts):
        planned_or_patched(model, patch, **options)


OPTIONS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    'operation': ('senn', {}, ("operation 'senn' is unknown", 'sem')),
    'operation_of_a_wrong_type': (7, {}, ('operation=7', 'name', 'configuration', 'class')),
    'operation_none': (None, {}, ('operation=None', 'name', 'configuration')),
    'operation_that_is_a_module': (nn.ReLU(), {}, ('ReLU', 'class')),
    'option': ('sem', {'reductoin': 8}, ("option 'reductoin'", "'sem'", 'reduction')),
    'option_of_a_configuration_class': (sem_timm.SEMConfig, {'reductoin': 8}, ('reductoin', 'reduction')),
    'configuration_class_without_its_factory': (sem_timm.InsertConfig, {}, ('InsertConfig', 'factory')),
    'option_of_another_operation': ('timm_cbam', {'reduction': 8}, ("option 'reduction'", "'timm_cbam'", 'position')),
    'operator': ('sem', {'operators': ('se', 'ecaa')}, ("operator 'ecaa'", 'eca', 'register_excitation')),
    'operator_that_is_no_class': ('sem', {'operators': ('se', 3)}, ('operator 3', 'se, eca, ie')),
    'no_operators': ('sem', {'operators': ()}, ('operators is empty', 'se, eca, ie')),
    'operators_of_a_wrong_type': ('sem', {'operators': 3}, ('operators=3', "('se', 'eca', 'ie')")),
    'position': ('sem', {'position': 'outputs'}, ("position='outputs'", "'auto', 'residual', 'output'")),
    'branches': ('sem', {'branches': 'first'}, ("branches='first'", "'last', 'all'")),
    'init': ('sem', {'init': 'papr'}, ("init='papr'", 'paper')),
    'init_of_a_wrong_type': ('sem', {'init': None}, ('init=None', "'identity', 'paper'")),
    'decision': ('sem', {'decision': 'softmx'}, ("decision='softmx'", 'softmax')),
    'decision_of_a_wrong_type': ('sem', {'decision': None}, ('decision=None', "'sigmoid', 'softmax', 'equal'")),
    'reduction_zero': ('sem', {'reduction': 0}, ('reduction=0', '1 or more')),
    'reduction_negative': ('se', {'reduction': -4}, ('reduction=-4', '1 or more')),
    'reduction_fraction': ('sem', {'reduction': 0.5}, ('reduction=0.5', 'whole number')),
    'configuration_and_options': (
        sem_timm.SEMConfig(),
        {'reduction': 8},
        ('reduction', 'SEMConfig(reduction=...)'),
    ),
    'input_size_too_short': ('sem', {'input_size': (0,)}, ('input_size=(0,)', '(3, 224, 224)')),
    'input_size_empty': ('sem', {'input_size': ()}, ('input_size=()', '(3, 224, 224)')),
    'input_size_text': ('sem', {'input_size': 'abc'}, ("input_size='abc'", '(3, 224, 224)')),
    'input_size_number': ('sem', {'input_size': 224}, ('input_size=224', '(3, 224, 224)')),
    'input_size_fraction': ('sem', {'input_size': (3, 64.0, 64.0)}, ('input_size=(3, 64.0, 64.0)', '(3, 224, 224)')),
    'input_size_negative': ('sem', {'input_size': (3, -64, 64)}, ('input_size=(3, -64, 64)', '(3, 224, 224)')),
    'input_size_wrong_channels': ('sem', {'input_size': (5, 64, 64)}, ('ResNet', 'input_size=(5, 64, 64)')),
    'input_size_without_channels': ('sem', {'input_size': (64, 64)}, ('ResNet', 'input_size=(64, 64)')),
}


@pytest.mark.parametrize('patch', [False, True], ids=['plan', 'patch'])
@pytest.mark.parametrize('case', OPTIONS)
def test_options(case: str, patch: bool) -> None:
    operation, options, parts = OPTIONS[case]
    model = resnet()
    with refused(model, OptionError, *parts):
        planned_or_patched(model, patch, operation, **options)


def test_an_input_size_that_the_model_rejects() -> None:
    model = FAMILIES['vit_registers'].create()
    with refused(model, OptionError, 'VisionTransformer', 'input_size=(3, 65, 64)', '65', 'divisible by patch size'):
        sem_timm.patch_model(model, input_size=(3, 65, 64))


def test_configurations_check_themselves() -> None:
    for make, parts in (
        (lambda: sem_timm.InsertConfig(3), ('factory=3', '(channels) -> nn.Module')),
        (lambda: sem_timm.InsertConfig(nn.ReLU, name='two words'), ("name='two words'", 'identifier')),
        (lambda: sem_timm.TimmAttentionConfig('cbm'), ("'cbm'", 'cbam')),
        (lambda: sem_timm.ExcitationConfig(excitation='sa'), ("'sa'", 'se')),
        (lambda: sem_timm.SEMConfig(position='input'), ("position='input'", "'output'")),
    ):
        with pytest.raises(OptionError) as caught:
            make()
        assert [part for part in parts if part not in str(caught.value)] == []


def no_module(channels: int) -> Any:
    return channels


def wider(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels + 1, 1)


def broken(channels: int) -> nn.Module:
    raise ValueError('no such thing')


@pytest.mark.parametrize(
    ('factory', 'parts'),
    [
        (no_module, ('no_module', 'returned a int', 'nn.Module')),
        (wider, ('(B, 32, 40, 40)', '(B, 33, 40, 40)')),
        (broken, ('(B, 32, 40, 40)', 'no such thing')),
        (nn.LayerNorm, ('(B, 32, 40, 40)', 'norm')),
    ],
)
def test_factories(factory: Callable[..., Any], parts: tuple[str, ...]) -> None:
    model = resnet()
    with refused(model, RefusedError, *parts):
        sem_timm.patch_model(model, factory)


def test_not_a_module() -> None:
    for thing in ('resnet50', None, nn.ReLU, [nn.ReLU()]):
        for call in (sem_timm.plan_model, sem_timm.patch_model, sem_timm.unpatch_model):
            with pytest.raises(ModelError, match=rf'torch\.nn\.Module is needed, not {type(thing).__name__}'):
                call(thing)


# Sites that are taken, shared or unreadable


def test_a_site_that_is_patched_already() -> None:
    model = resnet()
    sem_timm.patch_model(model, target=r'layer[12]\..*')
    with refused(model, RefusedError, "'layer1.0'", 'already patched (sem)', 'unpatch_model(model)'):
        sem_timm.patch_model(model, target='layer1.0')
    with refused(model, RefusedError, "'layer1.0'", 'already patched (sem)'):
        sem_timm.patch_model(model, 'timm_cbam', target=['layer3.0', 'layer1.0'])
    sem_timm.patch_model(model)
    with refused(model, RefusedError, 'ResNet', '4 blocks', 'layer1.0: it is already patched', 'unpatch_model(model)'):
        sem_timm.patch_model(model)


def test_undoing_what_was_not_done() -> None:
    model = resnet()
    with refused(model, ModelError, 'ResNet is not patched'):
        sem_timm.unpatch_model(model)
    sem_timm.unpatch_model(sem_timm.patch_model(model))
    with pytest.raises(ModelError, match='not patched'):
        sem_timm.unpatch_model(model)


class Stem(nn.Module):
    """A network of a stem and two blocks of 8 channels."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block
        self.last = BasicBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.stem(x)))


class Twice(Stem):
    """Calls its first block twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.block(self.stem(x))))


class Never(Stem):
    """Does not call its first block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x))


def test_a_block_with_several_call_sites_or_none() -> None:
    for cls, reason in ((Twice, 'calls it 2 times'), (Never, 'does not call it')):
        model = cls(BasicBlock(8, 8))
        with refused(model, RefusedError, "'block'", reason):
            sem_timm.patch_model(model, target='block')
        plan = sem_timm.plan_model(model)
        assert [site.name for site in plan] == ['last']
        if cls is Twice:
            assert [refusal.name for refusal in plan.refusals] == ['block'] and reason in plan.refusals[0].reason


class Picky(nn.Module):
    """A block that insists on a real tensor, which no tracer has to offer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise TypeError('a tensor is needed')  # the line that stops the trace
        return x + self.conv(x)


def test_a_block_that_cannot_be_traced() -> None:
    model = Stem(Picky())
    lines = Path(__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if 'that stops the trace' in text)
    where = f'test_bad_input.py:{line}: raise TypeError'
    with refused(model, RefusedError, "'block'", 'Picky', 'cannot be traced', 'a tensor is needed', where):
        sem_timm.patch_model(model, target='block', position='residual')
    # Where the residual branch was not insisted on, its output serves.
    assert [site.position for site in sem_timm.plan_model(model, target='block')] == ['output']


def test_a_model_without_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with refused(model, RefusedError, 'Sequential', 'no blocks'):
        sem_timm.patch_model(model)


def test_all_errors_are_of_one_family() -> None:
    for error in (GuardError, ModelError, NoMatchError, OptionError, PlanError, RefusedError, TraceError):
        assert issubclass(error, sem_timm.SemTimmError)


def test_an_error_whose_text_is_a_key_alone_is_told_with_its_class() -> None:
    with pytest.raises(KeyError) as caught:
        {}['heads']
    assert place_of(caught.value).startswith("KeyError: 'heads' (") and "{}['heads'])" in place_of(caught.value)
