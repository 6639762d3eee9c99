"""Layers are fitted one by one on what a run from the start gives, without computing earlier blocks again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.attention_transfer import resuming
from tests.attention_transfer.small_transformer import SIZE, batches, create, swapped

DEPTH = 5


class Summed(nn.Module):
    """A 'chain' of blocks; or the head is given the sum of all outputs, 'summed', or each block is, 'dense'."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = create(depth=DEPTH), kind

    def forward(self, images: Tensor) -> Any:
        x = self.inner._pos_embed(self.inner.patch_embed(images))
        outputs = []
        for block in self.inner.blocks:
            x = block(sum(outputs, x) if self.kind == 'dense' else x)
            outputs.append(x)
        return self.inner.head(self.inner.norm(sum(outputs) if self.kind == 'summed' else x)[:, 0])


def maps(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """What a fit of all layers writes."""
    sem_timm.transfer(model, images, stages=('initialize',))
    return {name: value for name, value in model.state_dict().items() if name.endswith(('mix', 'bias'))}


@pytest.fixture
def from_the_start(monkeypatch: pytest.MonkeyPatch) -> Any:
    def maps_so(*given: Any) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(resuming.ResumableRun, '_is_chain', lambda *_: False)
            return maps(*given)

    return maps_so


@pytest.mark.parametrize('kind', ['chain', 'summed', 'dense'])
def test_fits_what_a_run_from_the_start_fits(kind: str, from_the_start: Any) -> None:
    model = swapped('linear', model=Summed(kind), own=True, input_size=SIZE)
    images = [*batches(3), *batches(1, size=5)]
    wanted = from_the_start(copy.deepcopy(model), images)
    for name, found in maps(model, images).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['chain', 'dense'])
def test_blocks_of_a_chain_are_computed_once(kind: str) -> None:
    model, images = Summed(kind), batches(8)
    attentions = [f'inner.blocks.{number}.attn' for number in range(DEPTH)]
    run = resuming.ResumableRun(model, attentions, sem_timm.TransferOptions())
    computed = [0] * DEPTH
    for number, block in enumerate(model.inner.blocks):  # type: ignore[arg-type]
        block.mlp.register_forward_hook(lambda *_, number=number: computed.__setitem__(number, computed[number] + 1))
    for name in attentions:
        module = {name: model.get_submodule(name)}
        seen = [found[name] for found in run.reach(name, module, images, lambda _, args, kwargs: args[0].clone())]
        wanted: list[Tensor] = []
        with module[name].register_forward_pre_hook(lambda _, args, wanted=wanted: wanted.append(args[0].clone())):
            before = list(computed)
            for batch in images:
                model(batch)
            computed[:] = before
        torch.testing.assert_close(seen, wanted)
    checks = DEPTH - 2 if kind == 'chain' else DEPTH
    assert (computed[0] <= len(images) + checks) == (kind == 'chain'), computed


@torch.no_grad()
def test_a_model_is_left_as_it_was() -> None:
    model = create(depth=3)
    attentions = [f'blocks.{number}.attn' for number in range(3)]
    run = resuming.ResumableRun(model, attentions, sem_timm.TransferOptions())
    before = [dict(vars(module)) for module in model.modules()]
    wanted = model(batches(1)[0])
    for name in attentions:
        for _ in run.reach(name, {name: model.get_submodule(name)}, batches(2), lambda *_: None):
            pass
    assert [vars(module).keys() for module in model.modules()] == [found.keys() for found in before]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batches(1)[0]), wanted)
