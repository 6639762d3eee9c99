"""Running a model up to one layer after another, without computing again what lies before the last one.

Layers that are fitted one by one each need what reaches them in the model as it is by then. Run from its start for each
of n layers, a model costs n / 2 forward passes; continued from where the last run ended, it costs little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.attention_transfer.matching import narrow
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.surgery import tensors_in

# What is made of a module that is reached, and of its arguments.
Look = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

# What may differ between the two ways, as a part of the largest number: rounding, as not every device repeats itself.
TOLERANCE = 1e-4


class _Reached(Exception):
    """All modules that a model was run for have been reached."""


class ResumableRun:
    """A model that is run up to one layer after another, on the same batches.

    A unit is the outermost module that holds a finished layer and none that is to come. Finished units are not computed
    again: the last returns what it gave, which is kept for each batch, and those before it return zeros, which nothing
    reads in a chain of blocks. Whether it is a chain is seen on the first batch, for each layer: both ways are run, and
    what reaches the layer is compared. Where it differs, the model is run from its start.

    Example: ``x = blocks[0](x); x = blocks[1](x); x = blocks[2](x)``, up to ``blocks.2.attn``. Before, blocks 0 and 1
    were computed. Now block 0 returns what it gave when its attention was finished, and block 1 is computed and kept.

    Args:
        model: The model.
        order: Names of the layers, as the model computes them.
        options: The precision that it is run in.
    """

    def __init__(self, model: nn.Module, order: Sequence[str], options: TransferOptions) -> None:
        self.model, self.order, self.options = model, list(order), options
        self.outputs: dict[nn.Module, list[Tensor]] = {}  # of the finished units, for each batch

    def reach(self, layer: str, modules: dict[str, nn.Module], batches: Sequence[Tensor], look: Look) -> Iterator[Any]:
        """What ``look`` makes of some modules of a layer when they are reached, by name, for each batch in turn.

        Args:
            layer: The layer; those before it in the order have been asked for, and are finished.
            modules: The modules.
            batches: Images (B, C, H, W), the same for each layer.
            look: Called before a module is computed.
        """
        unit = self._unit_before(layer)
        given: list[Tensor] = []
        resumes = self._is_chain(modules, batches[0])
        for number, images in enumerate(batches):
            with _keeping(unit, given), self._skipping(number if resumes else None):
                found = self._run(modules, images, look)
            yield found
        if unit is None or len(given) != len(batches):  # it gives no tensor, or runs more than once
            self.outputs.clear()
            return
        for outputs in self.outputs.values():
            outputs[:] = [output.new_zeros(()).expand(output.shape) for output in outputs]
        self.outputs[unit] = given

    def _unit_before(self, layer: str) -> nn.Module | None:
        """The outermost module that holds the layer before this one, and neither this one nor a later one."""
        number = self.order.index(layer)
        if number == 0:
            return None
        parts = self.order[number - 1].split('.')
        for name in ('.'.join(parts[: depth + 1]) for depth in range(len(parts))):
            module = self.model.get_submodule(name)
            holds_later = any(f'{later}.'.startswith(f'{name}.') for later in self.order[number:])
            if not holds_later and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                return module
        return None

    def _is_chain(self, modules: dict[str, nn.Module], images: Tensor) -> bool:
        """Whether the same reaches some modules when finished units are not computed."""
        if not self.outputs:
            return False
        with self._skipping(0):
            resumed = self._run(modules, images, _arguments)
        computed = self._run(modules, images, _arguments)
        return all(_are_close(resumed[name], computed[name]) for name in modules)

    def _run(self, modules: dict[str, nn.Module], images: Tensor, look: Look) -> dict[str, Any]:
        with narrow(self.options, images):
            return run_up_to(modules, self.model, images, look)

    @contextmanager
    def _skipping(self, number: int | None) -> Iterator[None]:
        """Finished units return what is kept for a batch; with None they are computed."""
        with ExitStack() as stack:
            for unit, outputs in self.outputs.items() if number is not None else ():
                stack.enter_context(_returning(unit, outputs[number]))  # type: ignore[index]
            yield


@contextmanager
def _returning(module: nn.Module, output: Tensor) -> Iterator[None]:
    """A module whose forward returns a copy of a tensor, which may be written into."""
    own = module.__dict__.get('forward')
    module.__dict__['forward'] = lambda *args, **kwargs: output.clone()
    try:
        yield
    finally:
        del module.__dict__['forward']
        if own is not None:
            module.__dict__['forward'] = own


@contextmanager
def _keeping(module: nn.Module | None, outputs: list[Tensor]) -> Iterator[None]:
    """Copies of the tensors that a module returns are added to a list."""
    if module is None:
        yield
        return

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.detach().clone())

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_up_to(modules: dict[str, nn.Module], model: nn.Module, images: Tensor, look: Look) -> dict[str, Any]:
    """Runs a model until some modules have been reached, and gives what a function makes of each, by name."""
    found: dict[str, Any] = {}
    handles = []
    for name, module in modules.items():

        def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            found[name] = look(module, args, kwargs)
            if len(found) == len(modules):
                raise _Reached

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model(images)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _arguments(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_in((args, kwargs))]


def _are_close(one: list[Tensor], other: list[Tensor]) -> bool:
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False
    return all(torch.allclose(x, y, 0, TOLERANCE * float(y.abs().max())) for x, y in zip(one, other) if y.numel())
