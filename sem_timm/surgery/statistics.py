"""Running statistics of norms, as they were when a model was patched: they move in training even if all is frozen."""

from __future__ import annotations

from torch import Tensor, nn

# On a module that has any, under the names of its buffers. Copies and pickles of the model take them along.
_NOTED = '_surgery_statistics'


def note_statistics(model: nn.Module) -> None:
    """Keeps the running statistics of a model as they are now, but for those that an earlier patch has kept."""
    for module in model.modules():
        running = {key: b for key, b in module._buffers.items() if key.startswith('running_') and b is not None}
        if running and _NOTED not in module.__dict__:
            module.__dict__[_NOTED] = {key: buffer.detach().clone() for key, buffer in running.items()}


def forget_statistics(model: nn.Module) -> None:
    """Drops what `note_statistics` has kept."""
    for module in model.modules():
        module.__dict__.pop(_NOTED, None)


def noted_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics that a model had when it was patched, by their names in its state_dict."""
    return {
        f'{name}.{key}' if name else key: buffer
        for name, module in model.named_modules()
        for key, buffer in module.__dict__.get(_NOTED, {}).items()
    }
