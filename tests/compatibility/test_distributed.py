"""Training on two processes: each has half of a batch, and both learn what one would learn from all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh

import sem_timm
from tests.compatibility.cells import Cell, capability
from tests.compatibility.families import OPERATIONS, columns_of
from tests.compatibility.twins import Twins, assert_close, assert_same_gradients, gradients, make, new_parameters
from tests.outputs import loss_of
from tests.twins import assert_equal
from tests.versions import fully_shard

IMAGES = 4


@pytest.fixture(scope='module')
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes learned for all cells, since starting them takes longer than training."""
    folder = tmp_path_factory.mktemp('distributed')
    multiprocessing.spawn(train, (str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(2)]


def train(rank: int, folder: str) -> None:
    """One of two processes; writes gradients and weights of all cells to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    found = {}
    try:
        for operation in OPERATIONS:
            for column in columns_of(operation):
                twins = make(operation, column)
                for wrap in (data_parallel, fully_sharded):
                    for which, model in (('base', twins.base), ('model', twins.model), ('moved', twins.moved())):
                        images = twins.images(IMAGES)[2 * rank :][:2]
                        found[f'{operation}-{column} {wrap.__name__} {which}'] = wrap(copy.deepcopy(model), images)
        torch.save(found, Path(folder, f'{rank}.pt'))
    finally:
        torch.distributed.destroy_process_group()


def data_parallel(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    return learn(model, nn.parallel.DistributedDataParallel(model), images)


def fully_sharded(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    mesh = init_device_mesh('cpu', (2,))
    for part in sem_timm.patched_modules(model):
        fully_shard(model.get_submodule(part.name), mesh=mesh)
    return learn(model, fully_shard(model, mesh=mesh), images)


def learn(model: nn.Module, wrapper: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """Gradients of a step in which parameters that get none are an error, and the weights after a second one."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    learned = {}
    for step in range(2):
        optimizer.zero_grad()
        wrapper.train().eval()  # lets LeViT forget what it computed of its biases
        loss_of(wrapper(images)).backward()
        if step == 0:
            learned = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return {'gradients': learned, 'weights': {name: whole(p.detach()) for name, p in model.named_parameters()}}


def whole(tensor: Any) -> torch.Tensor:
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor
    return full.clone()


@capability('`DistributedDataParallel`, two processes', slow=True)
def test_data_parallel(twins: Twins, results: list[dict[str, Any]]) -> None:
    check(twins, results, 'data_parallel')


@capability('FSDP2 (`fully_shard`), two processes', slow=True)
def test_fully_sharded(twins: Twins, results: list[dict[str, Any]]) -> None:
    check(twins, results, 'fully_sharded')


def check(twins: Twins, results: list[dict[str, Any]], wrap: str) -> None:
    cell = Cell('', twins.operation, twins.name).id
    base, model, moved = (results[0][f'{cell} {wrap} {which}'] for which in ('base', 'model', 'moved'))
    assert_same_gradients(twins, base['gradients'], model['gradients'])
    assert_close(moved['gradients'], gradients(twins.moved(), twins.images(IMAGES)), rtol=1e-3, scale=1e-4)
    other = results[1][f'{cell} {wrap} moved']
    assert_equal(moved['weights'], other['weights'])
    start = dict(twins.moved().named_parameters())
    changed = {name for name, weight in moved['weights'].items() if not torch.equal(weight, start[name].detach())}
    new = new_parameters(twins.moved()).keys()
    # Not all of them move: some gradients are zero, as those of hidden units that are off, or lost in rounding.
    assert new <= moved['gradients'].keys() >= changed and new & changed
