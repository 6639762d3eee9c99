"""A rewritten forward is code like any other: it can be read, stepped through, copied and pickled."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import linecache
import pickle
import subprocess
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import sem_timm
from tests.families import FAMILIES
from tests.versions import weightless


def patched_resnet(**options: Any) -> Any:
    return sem_timm.patch_model(FAMILIES['resnet'].create(), **options)


BOTTLENECK = """\
def forward(self, x: torch.Tensor) -> torch.Tensor:
    out = self.conv1(x)
    out = self.bn1(out)
    out = self.act1(out)
    out = self.conv2(out)
    out = self.bn2(out)
    out = self.drop_block(out)
    out = self.act2(out)
    out = self.aa(out)
    out = self.conv3(out)
    out = self.bn3(out)
    x = self.downsample(x)
    out = self.sem(out, x)
    out = self.act3(out)
    return out
"""


def test_the_code_reads_like_hand_written_code() -> None:
    model = weightless('resnet50')
    plan = sem_timm.plan_model(model)
    assert plan.code('layer1.0') == BOTTLENECK
    assert plan.code('layer1.1') == BOTTLENECK.replace('    x = self.downsample(x)\n', '')
    sem_timm.patch_model(model, plan)
    assert inspect.getsource(type(model.layer1[0]).forward) == BOTTLENECK
    assert inspect.getsource(model.layer1[0].forward) == BOTTLENECK


def test_names_of_other_files_are_not_quoted_twice() -> None:
    """Files with postponed annotations have them as text."""
    plan = sem_timm.plan_model(Network(Keywords()), input_size=(3, 8, 8))
    header = plan.code('block').splitlines()[0]
    assert header == (
        'def forward(self, x: Tensor, mask: Tensor | None = None, *, sizes: tuple[int, ...] = ..., '
        "mode: str = 'plain') -> Tensor:"
    )


class Keywords(nn.Module):
    """A block with all kinds of arguments."""

    default = (1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, sizes: tuple[int, ...] = default, mode: str = 'plain'
    ) -> Tensor:
        """Adds."""
        return x + self.conv(x)


class Network(nn.Module):
    """A stem and one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


def test_parameters_keep_names_kinds_defaults_and_annotations() -> None:
    families = [FAMILIES[name] for name in ('resnet', 'dla', 'swin', 'coat', 'vgg')]
    models: list[tuple[Any, Any]] = [(family.create(), family.input_size) for family in families]
    for model, input_size in (*models, (Network(Keywords()), (3, 8, 8))):
        sem_timm.patch_model(model, input_size=input_size)
        for record in sem_timm.patched_modules(model):
            cls = type(model.get_submodule(record.name))
            base = cls.__mro__[1]
            assert inspect.signature(cls.forward) == inspect.signature(base.forward), record.name
            assert cls.forward.__annotations__ == base.forward.__annotations__
            assert cls.__doc__ == base.__doc__ and cls.__module__ == base.__module__


class PositionalOnly(nn.Module):
    """A block whose argument has no name for its callers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, /) -> Tensor:
        return x + self.conv(x)


def test_positional_only_arguments() -> None:
    model = Network(PositionalOnly())
    x = torch.randn(2, 8, 8, 8)
    expected = model.block(x)
    sem_timm.patch_model(model, target='block', position='residual', input_size=(3, 8, 8))
    assert torch.equal(expected, model.block(x))
    assert str(inspect.signature(model.block.forward)) == "(x: 'Tensor', /) -> 'Tensor'"


class Fails(nn.Module):
    """Raises when it is called on numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise ArithmeticError('no')
        return x


def test_a_traceback_shows_the_lines() -> None:
    for options, line in (({}, 'self.inserted(out)'), ({'position': 'output'}, 'BasicBlock.forward(self, x)')):
        model = sem_timm.patch_model(FAMILIES['resnet'].create(), Fails, **options)
        linecache.checkcache()
        with pytest.raises(ArithmeticError) as caught:
            model(FAMILIES['resnet'].images())
        text = ''.join(traceback.format_exception(caught.value))
        assert line in text and '<sem_timm BasicBlock' in text and 'in forward' in text


def test_equal_edits_share_a_class() -> None:
    first, second = weightless('resnet50'), weightless('resnet26')
    for model in (first, second):
        sem_timm.patch_model(model)
    classes = {type(module) for m in (first, second) for module in m.modules() if isinstance(module, Bottleneck)}
    assert len(classes) == 2  # with and without a projection
    assert type(first.layer1[1]) is type(second.layer4[1])
    other = sem_timm.patch_model(weightless('resnet26'), reduction=8)
    assert type(other.layer1[1]) is not type(first.layer1[1])  # it remembers another configuration


def test_it_is_an_instance_of_its_class() -> None:
    model = patched_resnet()
    block = model.layer1[0]
    assert isinstance(block, BasicBlock) and issubclass(type(block), BasicBlock) and type(block) is not BasicBlock
    assert block.expansion == BasicBlock.expansion
    assert type(block).__mro__[1] is BasicBlock
    assert 'PatchedBasicBlock(' in repr(model) and '(sem): SEM(' in repr(model)
    sem_timm.unpatch_model(model)
    assert type(block) is BasicBlock and 'Patched' not in repr(model) and 'SEM' not in repr(model)


def test_methods_of_the_class_and_super_work() -> None:
    class Verbose(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def describe(self) -> str:
            return super().__repr__()[:5]

    model = FAMILIES['resnet'].create()
    images = FAMILIES['resnet'].images()
    with torch.no_grad():
        before = model(images)
        model.layer1[0].__class__ = Verbose
        sem_timm.patch_model(model)
        assert torch.equal(before, model(images))
    assert model.layer1[0].describe()
    assert {record.name for record in sem_timm.patched_modules(model)} >= {'layer1.0', 'layer4.0'}
    sem_timm.unpatch_model(model)
    assert type(model.layer1[0]) is Verbose


def test_the_fused_sum_equals_the_sum_of_its_own() -> None:
    images = FAMILIES['resnet'].images()
    fused, apart = patched_resnet(), FAMILIES['resnet'].create()
    gates = [fused.get_submodule(f'{record.name}.sem') for record in sem_timm.patched_modules(fused)]
    sem_timm.patch_model(apart, sem_timm.InsertConfig(NoShortcut, name='sem', position='residual'))
    assert 'self.sem(out, x)' in inspect.getsource(type(fused.layer1[0]).forward)
    assert 'self.sem(out)' in inspect.getsource(type(apart.layer1[0]).forward)
    with torch.no_grad():
        assert torch.equal(fused(images), apart(images))
        for gate in gates:
            for parameter in gate.parameters():
                nn.init.normal_(parameter, std=0.3)
        apart.load_state_dict({key.replace('.sem.', '.sem.gate.'): v for key, v in fused.state_dict().items()})
        assert not torch.equal(fused(images), FAMILIES['resnet'].create()(images))
        # One operation rounds once where two round twice.
        torch.testing.assert_close(fused(images), apart(images), rtol=1e-4, atol=1e-5)


class NoShortcut(nn.Module):
    """SEM that is not handed the shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = sem_timm.SEM(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


def test_children_and_parameters_of_the_base_class_can_be_replaced() -> None:
    model, images = patched_resnet(), FAMILIES['resnet'].images()
    with torch.no_grad():
        before = model(images)
        model.layer1[0].act1 = nn.Identity()
        assert not torch.equal(before, model(images))
        calls = []
        model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append('conv1'))
        model.layer1[0].register_forward_hook(lambda *_: calls.append('block'))
        model.layer1[0].sem.register_forward_hook(lambda *_: calls.append('sem'))
        model(images)
    assert calls == ['conv1', 'sem', 'block']


RELOAD = """
import pickle, sys, torch
with open(sys.argv[1], 'rb') as file:
    model, images, expected = pickle.load(file)
import sem_timm
from tests.versions import weightless
with torch.no_grad():
    assert torch.equal(model(images), expected)
print(type(model.layer1[0]).__name__, len(sem_timm.patched_modules(model)))
sem_timm.unpatch_model(model)
print(type(model.layer1[0]).__name__, len(sem_timm.patched_modules(model)))
"""


def test_a_pickle_can_be_loaded_in_another_process(tmp_path: Path) -> None:
    model, images = patched_resnet(), FAMILIES['resnet'].images(1, 32)
    for record in sem_timm.patched_modules(model):
        for parameter in model.get_submodule(f'{record.name}.sem').parameters():
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(images)
    path = tmp_path / 'model.pickle'
    path.write_bytes(pickle.dumps((model, images, expected)))
    root = Path(sem_timm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, '-c', RELOAD, str(path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ['PatchedBasicBlock 4', 'BasicBlock 0'], done.stderr


def test_copies_and_pickles_keep_the_class() -> None:
    model = patched_resnet()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert other.state_dict().keys() == model.state_dict().keys()
    block = copy.copy(model.layer1[0])
    assert type(block) is type(model.layer1[0])


def test_undoing_lets_go_of_the_new_modules() -> None:
    model = patched_resnet()
    gate = weakref.ref(model.layer1[0].sem)
    sem_timm.unpatch_model(model)
    gc.collect()
    assert gate() is None
