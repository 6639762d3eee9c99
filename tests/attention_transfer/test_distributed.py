"""Two processes that draw one half of the images each learn what one process learns from all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

import sem_timm
from sem_timm.attention_transfer import value_maps
from sem_timm.attention_transfer.processes import Share
from sem_timm.compat import logit_distillation_task
from tests.attention_transfer.small_transformer import batches, create, labelled, swapped

STAGES: dict[str, dict[str, Any]] = {
    'initialize': {'own': True},
    'match': {'stages': ('match',), 'steps': 3},
    'features': {'stages': ('features',), 'features_steps': 3},
    'distill': {'stages': ('distill',), 'distill_steps': 3},
}


def learn(case: str, loader: Any, evaluation: Any, checkpoint: Path | None = None) -> dict[str, Any]:
    options = {'stages': ('initialize',), 'optimizer': 'sgd', 'weight_decay': 0.0, **STAGES[case]}
    model = swapped(own=options.pop('own', False))
    options.update(evaluation=evaluation, checkpoint=checkpoint, calibration_images=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_maps, 'RIDGES', (1e-3,))  # which halves of the images choose, and those are others here
        result = sem_timm.transfer(model, loader, **options)
    stage = result[case]
    with torch.no_grad():
        outputs = model(batches()[0])
    return {
        'outputs': outputs,
        'weights': model.state_dict(),
        'errors': stage.errors,
        'losses': stage.losses,
        'accuracy': stage.accuracy,
        'seen': stage.images_seen,
    }


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        evaluation = Share(labelled(create(), 4))
        found = {case: learn(case, Share(batches()), evaluation, Path(folder, f'{case}.pt')) for case in STAGES}
        again = learn('match', Share(batches()), evaluation, Path(folder, 'match.pt'))
        torch.save({**found, 'again': again}, f'{folder}/{rank}.pt')
        broken = batches(2)
        broken[1][1] = torch.nan  # an image of the second process
        with pytest.raises(sem_timm.ModelError, match='infinite or not a number'):
            learn('match', Share(broken), None)
        with pytest.raises(sem_timm.OptionError, match='there is no folder'):
            learn('match', Share(batches()), None, Path(folder, 'none', 'match.pt'))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """All stages in one test, since starting processes takes longer than they do."""
    logit_distillation_task()  # or else this timm lacks it
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2)]
    for case in STAGES:
        alone = learn(case, batches(), labelled(create(), 4))
        for found in (result[case] for result in results):
            assert found['seen'] == alone['seen'], case
            assert found['accuracy'] == pytest.approx(alone['accuracy']), case
            assert found['errors'] == pytest.approx(alone['errors'], rel=1e-3), case
            assert list(found['losses']) == pytest.approx(list(alone['losses']), rel=1e-3), case
            torch.testing.assert_close(found['outputs'], alone['outputs'], rtol=1e-3, atol=1e-3, msg=case)
            # What a closed form gives is not known to the last digit where directions are hardly seen.
            for name, tensor in alone['weights'].items() if case != 'initialize' else ():
                torch.testing.assert_close(found['weights'][name], tensor, rtol=1e-3, atol=1e-4, msg=f'{case} {name}')
        start = swapped(own=STAGES[case].get('own', False)).state_dict()
        assert any(not torch.equal(tensor, start[name]) for name, tensor in alone['weights'].items()), case
    for result in results:
        pairs = zip(result['again']['weights'].values(), result['match']['weights'].values())
        assert all(torch.equal(one, other) for one, other in pairs)
