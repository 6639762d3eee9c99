"""The weightless copy and what one forward of it shows."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.meta.probing import probe
from sem_timm.meta.skeleton import shadow, weightless
from tests.twins import trained


class Settings:
    """What several modules keep one of."""

    def __init__(self) -> None:
        self.names = ['a']


class Frozen(OrderedDict[str, Any]):
    """A dictionary that can be read."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError('it is frozen')


class FrozenAltogether(dict[str, Any]):
    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.is_frozen = True

    def __setitem__(self, key: str, value: Any) -> None:
        if vars(self):
            raise TypeError('it is frozen')

    update = __setitem__  # type: ignore[assignment]


class Block(nn.Module):
    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize('cls', [Frozen, FrozenAltogether])
def test_dictionaries_may_forbid_changes(cls: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block())
    model.parts = cls({'block': model[1], 'width': 8})
    copied: Any = weightless(model)
    assert type(copied.parts) is cls and copied.parts['block'] is copied[1] and copied.parts['width'] == 8
    assert len(sem_timm.plan_model(model, input_size=(3, 8, 8))) == 1


def test_what_modules_share_their_copies_share() -> None:
    settings = Settings()
    copied: Any = weightless(nn.Sequential(Block(settings), Block(settings)))
    assert copied[0].settings is copied[1].settings is not settings


class Collecting(nn.Module):
    """Registers hooks in its first forward that collect what the blocks return, and relies on them, as some do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Conv2d(16, 4, 1)
        self.is_hooked = False
        self.collected: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        collected: list[Tensor] = []
        if not self.is_hooked:
            self.is_hooked = True
            for block in self.blocks:
                block.register_forward_hook(self.collect)
        self.collected = collected
        self.blocks(self.stem(x))
        self.collected = []
        return self.head(torch.cat(collected, 1))

    def collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.collected.append(output)


@pytest.mark.parametrize('called_before', [False, True])
def test_hooks_that_a_forward_registers_act_in_the_copy(called_before: bool) -> None:
    model, x = Collecting().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x) if called_before else None
    hooks = [len(block._forward_hooks) for block in model.blocks]
    sem_timm.patch_model(model, input_size=(3, 8, 8))
    assert hooks == [len(block._forward_hooks) for block in model.blocks] and model.is_hooked == called_before
    found = model(x)
    assert expected is None or torch.equal(found, expected)
    assert not torch.equal(found, trained(model)(x))
    assert torch.equal(model(x), shadow(model)(x))


def test_hooks_of_others_are_not_called() -> None:
    called: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block())
    model[1].register_forward_hook(lambda *_: called.append('forward'))
    model[1].register_forward_pre_hook(lambda *_: called.append('before'))
    probe(model, (3, 8, 8))
    shadow(model)(torch.randn(1, 3, 8, 8))
    assert called == []


# Models that decide by numbers


class Detector(nn.Module):
    """Finds as many boxes as there are, which nothing without numbers can do."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        found = self.head(self.backbone(nn.functional.interpolate(images, (16, 24))))
        return found[found > 0]


def test_the_part_that_can_be_patched_is_named() -> None:
    model = Detector(nn.Sequential(nn.Conv2d(3, 8, 1), Block())).eval()
    with pytest.raises(sem_timm.OptionError, match=r'plan_model\(model\.backbone, \.\.\., input_size=\(3, 16, 24\)\)'):
        sem_timm.plan_model(model, input_size=(3, 8, 8))
    with pytest.raises(sem_timm.ModelError, match=r'plan_model\(model\.backbone, \.\.\., input_size=\(3, 16, 24\)\)'):
        sem_timm.plan_model(model)
    x = torch.randn(1, 3, 8, 8)
    base = model(x)
    sem_timm.patch_model(model.backbone, input_size=(3, 16, 24))
    assert torch.equal(model(x), base) and trained(model)(x).shape != base.shape


def test_nothing_is_named_where_no_part_had_run() -> None:
    model = Detector(Detector(nn.Conv2d(3, 8, 1)))
    model.backbone.head = nn.Identity()
    with pytest.raises(sem_timm.OptionError) as caught:
        sem_timm.plan_model(model, input_size=(4, 8, 8))
    assert 'plan_model' not in str(caught.value)


def test_a_number_in_a_tensor_fills_another() -> None:
    class Fills(Block):
        stride = torch.tensor(8.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.new_full((1,), self.scale)

    block = Fills()
    block.scale = torch.tensor(2.0)
    assert probe(nn.Sequential(nn.Conv2d(3, 8, 1), block), (3, 8, 8)).calls['1'].output.shape == (2, 8, 8, 8)
