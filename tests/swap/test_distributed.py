"""Training on two processes, where every parameter that requires a gradient must get one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing, nn

import sem_timm
from tests.swap.classes import CLASSES
from tests.thorough import thorough

VIT, SWIN = 'layers.attention.Attention', 'models.swin_transformer.WindowAttention'
CASES = {
    'vit': (VIT, 'external', {}),
    'swin': (SWIN, 'external', {'drop_path_rate': 0.0}),
    'swin eamlp': (SWIN, 'eamlp', {'drop_path_rate': 0.0}),
}


def train(rank: int, folder: str) -> None:
    """Two steps of each case in one of two processes; writes losses and weights to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        results = {case: two_steps(rank, *CASES[case]) for case in CASES}
        torch.save(results, f'{folder}/{rank}.pt')
    finally:
        torch.distributed.destroy_process_group()


def two_steps(rank: int, name: str, operation: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(rank)  # so that only what is sent from the first process can make the weights equal
    family = CLASSES[name]
    model = family.create(**options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(model, operation, input_size=family.input_size)
    wrapper = nn.parallel.DistributedDataParallel(model.train(), find_unused_parameters=False)
    optimizer = torch.optim.SGD(sem_timm.trainable_parameters(wrapper), 0.01)
    losses = []
    for step in range(2):
        numbers = torch.Generator().manual_seed(2 * step + rank)
        loss = wrapper(torch.randn(2, *family.input_size, generator=numbers)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {'losses': losses, 'weights': model.state_dict()}


@thorough
def test_two_processes_learn_the_same_weights(tmp_path: Path) -> None:
    """All cases in one test, since starting processes takes longer than training."""
    multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    for case, (name, _, options) in CASES.items():
        first, second = (result[case] for result in results)
        assert first['losses'] != second['losses'], case
        weights = first['weights']
        assert weights and all(torch.equal(tensor, second['weights'][key]) for key, tensor in weights.items()), case
        start = CLASSES[name].create(**options).state_dict()
        moved = {key for key, tensor in start.items() if not torch.equal(tensor, weights[key])}
        assert moved and not any('relative_position' in key for key in moved), case
