"""A patched forward decides as its base does: by sizes of arguments, by what children return, by what is None."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import GuardError
from tests.lively import lively
from tests.thorough import first_of_each


class Branch(nn.Module):
    """Layers for a block on 8 channels, of which one halves the size and one has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.halve = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)


class Pads(Branch):
    """Decides by a size of its argument, twice."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.norm(self.first(x))
        if x.shape[2] % 2 or x.shape[3] % 2:
            out = F.pad(out[..., 1:], (1, 0)) * 1.5
        return x + (out if scale is None else out * scale)


class PadsBehind(Branch):
    """Decides by the size of what a child returns."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.norm(self.halve(self.first(x)))
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True)
        if out.shape[2] % 2:
            out, shortcut = F.pad(out, (0, 0, 0, 1)) * 1.5, F.pad(shortcut, (0, 0, 0, 1))
        return shortcut + (out if scale is None else out * scale)


class CountsSamples(Branch):
    """Decides by the number of samples."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.norm(self.first(x))
        if len(x) == 1 and x.shape[2] > 16:
            out = out * 2
        return x + (out if scale is None else out * scale)


class Net(nn.Module):
    """A stem and a block."""

    def __init__(self, block: type[Branch]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.block(self.stem(x), scale)


def stirred(model: nn.Module) -> nn.Module:
    """Gates that are no identity."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if '.sem.' in name:
            nn.init.uniform_(parameter, -1, 1, generator=generator)
    return model


def planned_for(base: nn.Module, size: tuple[int, int]) -> nn.Module:
    """What a plan at a size makes of a copy of the base."""
    return sem_timm.patch_model(copy.deepcopy(base), target='block', position='residual', input_size=(3, *size))


BLOCKS = [Pads, PadsBehind, CountsSamples]
SIZES = [(16, 16), (18, 16), (17, 18), (16, 17), (30, 31), (16, 16)]


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'training'])
def test_every_size_gives_what_a_plan_for_it_would(block: type[Branch], training: bool) -> None:
    base = lively(Net(block))
    model = stirred(planned_for(base, (16, 16))).train(training)
    others = {size: planned_for(base, size) for size in SIZES}
    gated = False
    for batch in (2, 1):
        for size in SIZES:
            x = torch.randn(batch, 3, *size)
            other = others[size].train(training)
            other.load_state_dict(model.state_dict())
            assert torch.equal(model(x), other(x))
            # Statistics are counted once, though the size was met for the first time.
            for key, value in model.state_dict().items():
                assert torch.equal(value, other.state_dict()[key]), key
            with sem_timm.disabled(model):
                gated |= not torch.allclose(model.eval()(x), other.eval()(x), atol=1e-3)
            model.train(training)
    assert gated


@pytest.mark.parametrize('block', BLOCKS)
def test_what_was_none_may_be_given(block: type[Branch]) -> None:
    base = lively(Net(block)).eval()
    model = sem_timm.patch_model(copy.deepcopy(base), target='block', position='residual', input_size=(3, 16, 16))
    x, scale = torch.randn(2, 3, 17, 16), torch.rand(2, 1, 1, 1)
    for given in (None, scale, None, scale[:1]):
        assert torch.equal(model(x, given), base(x, given))


def met(size: tuple[int, int]) -> nn.Module:
    """A patched model that has met another size."""
    model = sem_timm.patch_model(lively(Net(Pads)).eval(), target='block', position='residual', input_size=(3, 16, 16))
    stirred(model)(torch.randn(2, 3, *size))
    return model


def test_cases_that_were_met_are_copied_saved_and_undone() -> None:
    model, x = met((17, 18)), torch.randn(2, 3, 17, 18)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert 'cases' not in str(model.state_dict().keys())
    sem_timm.unpatch_model(model)
    assert not [key for key in model.block.__dict__ if key.startswith('_surgery')]


def test_compilers_follow_the_cases_that_were_met() -> None:
    model = met((17, 18))
    for size in ((16, 16), (17, 18)):
        x = torch.randn(2, 3, *size)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        program = torch.export.export(model, (x,), strict=False).module()
        assert torch.allclose(program(x), model(x), rtol=1e-5, atol=1e-6)
    fresh = sem_timm.patch_model(Net(Pads).eval(), target='block', position='residual', input_size=(3, 16, 16))
    with pytest.raises(GuardError, match='Run the model once on such an input'):
        torch.export.export(fresh, (torch.randn(2, 3, 17, 18),), strict=False)


def test_plans_and_random_numbers_of_others_are_not_disturbed() -> None:
    model = sem_timm.patch_model(Net(Pads).eval(), target='block', position='residual', input_size=(3, 16, 16))
    state = torch.get_rng_state()
    with torch.inference_mode():
        model(torch.randn(2, 3, 17, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.randn(2, 3, 17, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.block.sem.parameters())


WINDOWED = [
    ('tiny_vit_5m_224', 'sem', {}, [(224, 224), (128, 96), (96, 160)]),
    ('twins_svt_small', 'external', {'depths': (2, 1, 1, 1)}, [(128, 96)]),
    ('cpubone_nano', 'external', {}, [(224, 224), (100, 130)]),
]


@pytest.mark.parametrize(
    ('name', 'operation', 'options', 'sizes'), first_of_each(WINDOWED, lambda name, operation, *rest: operation)
)
def test_windows_of_timm_are_padded_as_in_the_base(name: str, operation: str, options: Any, sizes: Any) -> None:
    base = lively(timm.create_model(name, num_classes=4, **options)).eval()
    with pytest.warns(sem_timm.SwapWarning) if operation == 'external' else torch.no_grad():
        model = sem_timm.patch_model(copy.deepcopy(base), operation)
    for size in sizes:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            if operation == 'sem':
                assert torch.equal(model(x), base(x))
                continue
            with pytest.warns(sem_timm.SwapWarning):
                other = sem_timm.patch_model(copy.deepcopy(base), operation, input_size=(3, *size))
            other.load_state_dict(model.state_dict())
            assert torch.equal(model(x), other(x))


def test_a_case_that_cannot_be_served_says_why() -> None:
    with pytest.warns(sem_timm.SwapWarning):
        model = sem_timm.patch_model(timm.create_model('test_vit').eval(), 'external')
    with pytest.raises(GuardError, match=r'(?s)planned for other calls.*causal.*unpatch_model'):
        model.blocks[0].attn(torch.randn(2, 6, 64), is_causal=True)


class Optional(nn.Module):
    """Returns one tensor, or several, as it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor, several: bool = False, nothing: bool = False) -> object:
        out = self.conv(x)
        return None if nothing else (out, x) if several else out


def test_what_is_gated_as_a_whole_may_return_one_tensor_or_several() -> None:
    model = nn.Sequential(Optional()).eval()
    x, base = torch.randn(2, 3, 8, 8), copy.deepcopy(model[0])
    stirred(sem_timm.patch_model(model, position='output', target='0', input_size=(3, 8, 8)))
    out, again = model[0](x, several=True)
    assert torch.equal(out, model[0](x)) and again is x and not torch.allclose(out, base(x))
    with pytest.raises(GuardError, match='no tensor'):
        model[0](x, nothing=True)
