"""What processes that transfer together tell each other, such as those of accelerate or torchrun; one alone is all.

Each has the whole model and draws its own part of the images. Sums for closed forms, gradients and measures are those
of all images, so that all processes learn the same. Nothing is exchanged, and nothing imported, by a process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

Told = TypeVar('Told')


def number_of_processes() -> int:
    """How many transfer together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files."""
    return number_of_processes() == 1 or dist.get_rank() == 0


class Share:
    """Every n-th image of each batch of a loader that draws the same batches in all of n processes.

    Args:
        loader: The loader, with a length, of images, or of images and what comes with them. Of a batch with fewer than
            n images some processes have one of the others' too.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        count = number_of_processes()
        if count == 1:
            return iter(self.loader)
        rank = dist.get_rank()
        return (tree_map_only(Tensor, lambda x: x[rank % len(x) :: count], batch) for batch in self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, where and in the type that it is."""
    return _reduced(tensor, dist.ReduceOp.SUM) if number_of_processes() > 1 else tensor


def fewest(number: int) -> int:
    """The smallest of the numbers that the processes have."""
    return int(_reduced(torch.tensor(number), dist.ReduceOp.MIN)) if number_of_processes() > 1 else number


def is_so_anywhere(here: bool) -> bool:
    """Whether something is so in any process."""
    return bool(_reduced(torch.tensor(int(here)), dist.ReduceOp.MAX)) if number_of_processes() > 1 else here


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter of an optimizer the mean of its gradients over all processes."""
    count = number_of_processes()
    if count > 1:
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean = _reduced(torch.cat([gradient.flatten() for gradient in gradients]), dist.ReduceOp.SUM) / count
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Gives tensors the numbers that the main process has in them."""
    for tensor in tensors if number_of_processes() > 1 else ():
        sent = tensor.detach().to(_device()).contiguous()
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


def done_by_main(function: Callable[[], Told]) -> Told:
    """What a function returns, or raises, in the main process, in all of them."""
    if number_of_processes() == 1:
        return function()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = function()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, 0, device=_device())
    if told[1] is not None:
        raise told[1]
    found: Told = told[0]
    return found


def _reduced(tensor: Tensor, how: Any) -> Tensor:
    sent = tensor.to(_device(), copy=True)
    dist.all_reduce(sent, how)
    return sent.to(tensor.device)


def _device() -> torch.device:
    """Where the backend takes tensors from."""
    return torch.device('cuda', torch.cuda.current_device()) if dist.get_backend() == 'nccl' else torch.device('cpu')
