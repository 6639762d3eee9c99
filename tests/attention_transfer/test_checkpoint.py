"""A transfer that was stopped goes on where it was, and gives what it would have given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import sem_timm
from sem_timm import OptionError
from tests.attention_transfer.small_transformer import batches, create, labelled, swapped
from tests.refusals import refused

STAGES = ('initialize', 'match', 'features')


def shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.cat(batches())), 16, shuffle=True)


class Stopped(Exception):
    pass


def stop(stage: str, step: int, steps: int, loss: float) -> None:
    if (stage, step) == ('features', 2):
        raise Stopped


def test_one_that_goes_on_gives_what_one_in_one_go_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {'stages': STAGES, 'evaluation': labelled(create())}
    whole, parts = swapped(own=True), swapped(own=True)
    wanted = sem_timm.transfer(whole, shuffled(), **options)
    file = tmp_path / 'transfer.pt'
    before = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
    with pytest.raises(Stopped):
        sem_timm.transfer(parts, shuffled(), checkpoint=file, progress=stop, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.state_dict().items())
    seen = []
    given = sem_timm.transfer(
        parts, shuffled(), checkpoint=file, progress=lambda *step: seen.append(step[0]), **options
    )
    assert set(seen) == {'features'}
    for one, other in zip(given.stages, wanted.stages):
        assert (one.name, one.errors, one.accuracy, one.losses) == (
            other.name,
            other.errors,
            other.accuracy,
            other.losses,
        )
    for one, other in zip(parts.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(one, other)
    again = sem_timm.transfer(
        parts, shuffled(), checkpoint=file, progress=lambda *step: seen.append(step[0]), **options
    )
    assert again['features'].losses == given['features'].losses and set(seen) == {'features'}


def test_other_options_another_model_and_other_files(tmp_path: Path) -> None:
    file = tmp_path / 'transfer.pt'
    sem_timm.transfer(swapped(), batches(), stages=('initialize',), checkpoint=file)
    model = swapped()
    with refused(model, OptionError, 'of another transfer', 'seed=0 there and 1 here', 'name a new file'):
        sem_timm.transfer(model, batches(), stages=('initialize',), checkpoint=file, seed=1)
    other = swapped(memory=5)
    with refused(other, OptionError, 'another model or swap'):
        sem_timm.transfer(other, batches(), stages=('initialize',), checkpoint=file)
    with refused(model, OptionError, 'there is no folder'):
        sem_timm.transfer(model, batches(), checkpoint=tmp_path / 'none' / 'transfer.pt')
    (tmp_path / 'notes.txt').write_text('no transfer')
    with refused(model, OptionError, 'no transfer that was stopped'):
        sem_timm.transfer(model, batches(), checkpoint=tmp_path / 'notes.txt')
