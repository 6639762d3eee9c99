"""Calls that decide otherwise than the one that was planned for: their case is read when it is first met.

Of a forward that pads what its windows do not divide, a plan has read the case of its probe:

    def _fits(self, x):
        if x.shape[2] % 7 > 0:
            return False
        return True

    def forward(self, x):
        if not _fits(self, x):
            return other_case(self, x)
        ...

For another call the forward is traced, edited and proved again, as by the plan, with what that call was given. The
class that comes of it stays with the module, and its forward is run from then on wherever it fits; a compiler, which
cannot wait for a plan, is shown those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sem_timm.errors import GuardError, RefusedError, TraceError
from sem_timm.meta.layout import Layout, is_learned, layout_of, set_layout, set_learned
from sem_timm.meta.probing import Call, probe_call
from sem_timm.meta.skeleton import dtype_of, on_meta, weightless
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.arguments import bind, forward_signature, passed, same_tensors
from sem_timm.surgery.decisions import FITS
from sem_timm.surgery.placement import Placement, Placer
from sem_timm.surgery.reading import Reader, bound_arguments, planning
from sem_timm.surgery.rewrite import CASES, Edit, edit_of, note_of, patched_class, put_back
from sem_timm.surgery.sites import AttentionSite, Refused


def has_cases(edit: Edit) -> bool:
    """Whether the forward that an edit makes does not hold for all calls."""
    return f'def {FITS}(' in edit.source


def layouts_of_arguments(reader: Reader, name: str) -> dict[str, tuple[Layout | bool, ...]]:
    """The layouts of the tensors in each argument of the call of a module; whether one is learned that has none."""
    values = bound_arguments(reader.modules[name], reader.probe.calls[name])
    return {
        key: tuple(layout_of(leaf) or is_learned(leaf) for leaf in tensors_in(value)) for key, value in values.items()
    }


def run_other_case(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], placer_of: Callable[[Reader, Any], Placer]
) -> Any:
    """Runs the forward of the case that a call is of, which is read if it was never met.

    Args:
        module: The patched module.
        args: What it is given by place.
        kwargs: What it is given by name.
        placer_of: Makes the placer that the module's sites were found by.

    Raises:
        GuardError: If the new module cannot serve such a call, or a compiler asks for a case that is not there.
    """
    for cls in getattr(module, CASES):
        if getattr(cls, FITS)(module, *args, **kwargs):
            return cls.forward(module, *args, **kwargs)
    if torch.compiler.is_compiling():
        raise GuardError(
            f'{type(module).__name__} was planned for other calls than this one, and nothing can be planned while a '
            'model is compiled or exported. Run the model once on such an input before.'
        )
    cls = _read(module, args, kwargs, placer_of)
    module.__dict__[CASES] = (*getattr(module, CASES), cls)
    return cls.forward(module, *args, **kwargs)


def _read(module: nn.Module, args: Any, kwargs: Any, placer_of: Callable[[Reader, Any], Placer]) -> Any:
    """The class of the case that a call is of."""
    edit = edit_of(module, inherited=True)
    assert edit is not None
    failure: Exception | None = None
    # A batch of one is hard to tell from axes that are one by nature, and two samples mostly decide as one does.
    for at_least in (2, 1):
        try:
            with planning(), torch.inference_mode(False), torch.no_grad():
                cls: Any = patched_class(_placed(module, edit, args, kwargs, at_least, placer_of).edit)
            if getattr(cls, FITS, _always)(module, *args, **kwargs):
                return cls
        except (Refused, RefusedError, TraceError) as error:
            failure = error
        except Exception as error:  # what the foreign forward raises on the meta device
            failure = failure or error
    raise GuardError(
        f'{edit.base.__name__} was planned for other calls than this one, which {edit.operation} cannot follow: '
        f'{failure or "it decides otherwise each time"}.\n'
        '  Undo the patch for such calls, unpatch_model(model), or leave this module out, exclude=...'
    ) from failure


def _placed(
    module: nn.Module,
    edit: Edit,
    args: Any,
    kwargs: Any,
    at_least: int,
    placer_of: Callable[[Reader, Any], Placer],
) -> Placement:
    note, skeleton = note_of(module), weightless(module)
    skeleton.__class__ = patched_class(edit)  # whatever somebody derived from it
    put_back(skeleton, edit)
    signature = forward_signature(edit.base)
    given = bind(signature, Call(args, kwargs, None))
    values = {k: _on_meta(v, note.layouts.get(k, ()), dtype_of(skeleton), at_least) for k, v in given.items()}
    values |= {key: values[other] for key, other in same_tensors(given).items()}
    args, kwargs = passed(signature, values)
    reader = Reader(probe_call(skeleton, note.input_size, *args, **kwargs))
    placer = placer_of(reader, edit.operation)
    placement = placer.place('')
    placer.prove('', placement)
    if [*map(_form, placement.sites)] != [*map(_form, note.sites)] or placement.edit.inserted != edit.inserted:
        raise Refused('its sites are others')
    return placement


def _on_meta(value: Any, layouts: tuple[Layout | bool, ...], dtype: torch.dtype, at_least: int) -> Any:
    """An argument without numbers and with its layouts, of a number of samples."""
    known: Iterator[Layout | bool] = iter(layouts if len(layouts) == len(tensors_in(value)) else ())

    def convert(tensor: Tensor) -> Tensor:
        # Where there was nothing when it was planned, nobody saw what this is made of: only a gradient tells a shared
        # bias from a mask, which must not be dropped.
        twin, layout = on_meta(tensor, dtype), next(known, tensor.requires_grad)
        if isinstance(layout, bool):
            return set_learned(twin) if layout else twin
        if layout.batch is not None and twin.shape[layout.batch] == 1:
            twin = torch.cat([twin] * at_least, layout.batch)
        return set_layout(twin, layout)

    return tree_map_only(Tensor, convert, value)


def _form(site: Any) -> tuple[Any, ...]:
    """What of a site its new child was built for, but for the numbers of tokens."""
    if isinstance(site, AttentionSite):
        widths = (site.shape[-1], site.key_shape[-1], site.value_shape[-1])
        return (site.attribute, site.num_heads, site.head_axis, *widths)
    return site.attribute, site.position, site.channels, site.channel_dim, site.num_prefix_tokens


def _always(*args: Any, **kwargs: Any) -> bool:
    return True
