"""An edited graph becomes the forward of a subclass of the module's own class; and back.

A patched module is its old self with another ``__class__``: same attributes, same parameters, same name, still an
instance of its class. The subclass is made once for equal code, shows its source to `inspect` and to tracebacks, and
can be copied and pickled.
"""

from __future__ import annotations
import __future__

import linecache
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import nn

from sem_timm.errors import ModelError
from sem_timm.meta.layout import Layout
from sem_timm.surgery.decisions import FITS, check
from sem_timm.surgery.equivalents import attributes_of, forward_of
from sem_timm.surgery.fitting import tried
from sem_timm.surgery.loading import loading
from sem_timm.surgery.sites import AttentionSite, Operation, Site


@dataclass(frozen=True)
class Edit:
    """What makes one patched class out of another class.

    Attributes:
        base: The module's own class.
        source: Source code of the new forward.
        bindings: Global names that the source uses, with what they stand for.
        inserted: Names of the new children.
        position: Where they act: 'residual', 'output' or 'core'.
        operation: The configuration of the operation, as the user may see it again.
    """

    base: type
    source: str
    bindings: tuple[tuple[str, Any], ...]
    inserted: tuple[str, ...]
    position: str
    operation: Operation


class Note(NamedTuple):
    """What is kept on a patched module of one of its edits.

    Attributes:
        number: Which patch of the model it belongs to, counted from 0.
        input_size: Shape (C, H, W) of the plan's probe.
        sites: The sites of the plan in this module.
        layouts: The layouts of the tensors in each argument of the call that was planned for, by its name.
    """

    number: int
    input_size: tuple[int, ...]
    sites: tuple[Site | AttentionSite, ...]
    layouts: dict[str, tuple[Layout | bool, ...]] = {}  # noqa: RUF012 (never changed)


def edit_of(module: nn.Module, *, inherited: bool = False) -> Edit | None:
    """The edit that made the module's class, or with ``inherited`` one it derives from; None if there is none."""
    cls = type(module)
    return getattr(cls, '_surgery_edit', None) if inherited else cls.__dict__.get('_surgery_edit')


# Kept on a patched module: what was noted of each edit in force, the last one last.
_NOTES = '_surgery_notes'

# And the classes of further cases of its forward that were met since, see `sem_timm.surgery.cases`.
CASES = '_surgery_cases'


def put_in(module: nn.Module, edit: Edit, note: Note) -> None:
    """Puts an edit in force in a module that has its new children, and keeps a note of it there."""
    module.__class__ = patched_class(edit)
    module.__dict__[_NOTES] = (*module.__dict__.get(_NOTES, ()), note)


def put_back(module: nn.Module, edit: Edit) -> None:
    """Takes the last edit of a module back: its class, its note and its children, or what there is of them yet."""
    if edit_of(module) == edit:
        module.__class__ = edit.base
        notes = module.__dict__.pop(_NOTES, ())[:-1]
        module.__dict__.pop(CASES, None)
        if notes:
            module.__dict__[_NOTES] = notes
    for name in edit.inserted:
        if name in module._modules:
            delattr(module, name)


def note_of(module: nn.Module) -> Note:
    """What was noted of the last edit of a patched module."""
    return Note(*module.__dict__[_NOTES][-1])


# Kept on a module whose patch is switched off for the moment.
DISABLED = '_surgery_disabled'


# The patched classes that are in use, one for equal edits: modules of one class compile together.
_CLASSES: WeakValueDictionary[Edit, type] = WeakValueDictionary()


def patched_class(edit: Edit) -> Any:
    """The subclass of ``edit.base`` with the new forward; the same one for equal edits, as long as it is in use."""
    known = _CLASSES.get(edit)
    if known is None:
        known = _CLASSES[edit] = _made(edit)
    return known


def _made(edit: Edit) -> type:
    namespace = {
        **_compiled(edit),
        '_surgery_edit': edit,
        '__doc__': edit.base.__doc__,
        '__module__': edit.base.__module__,
        '__reduce_ex__': _reduce_ex,
        CASES: (),
        '_load_from_state_dict': loading(edit),
        **(attributes_of(edit.base) if edit.position == 'core' else {}),
        **{name: _folding(name) for name in _FOLDS if callable(getattr(edit.base, name, None))},
    }
    metaclass: Any = type(edit.base)
    made: type = metaclass(f'Patched{edit.base.__name__}', (edit.base,), namespace)
    weakref.finalize(made, linecache.cache.pop, _filename(edit), None)
    return made


# Under these names timm's modules fold their layers into fewer, and with them the sum that a patch works on.
_FOLDS = ('fuse', 'reparameterize', 'switch_to_deploy')


def _folding(name: str) -> Callable[..., Any]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(
            f'{type(self).__name__}.{name} would fold away what was inserted; fold the model first and patch it then: '
            'unpatch_model(model), reparameterize_model(model), patch_model(model).'
        )

    return refuse


def _compiled(edit: Edit) -> dict[str, Callable[..., Any]]:
    """Executes the source; the forward carries the defaults and annotations of the one that it replaces."""
    filename = _filename(edit)
    linecache.cache[filename] = (len(edit.source), None, edit.source.splitlines(keepends=True), filename)
    # Nameless: torch.compile (2.9) looks for the bindings in the module that a scope names.
    scope: dict[str, Any] = dict(edit.bindings)
    made: dict[str, Any] = {}
    # Annotations are kept as written and not evaluated: the names in them belong to another file.
    flags = __future__.annotations.compiler_flag
    exec(compile(edit.source, filename, 'exec', flags=flags, dont_inherit=True), scope, made)
    original = forward_of(edit.base)
    for method in made.values():
        method.__defaults__, method.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
        method.__module__ = edit.base.__module__
        method.__qualname__ = f'Patched{edit.base.__qualname__}.{method.__name__}'
    forward, fits = made['forward'], made.get(FITS)
    forward.__annotations__ = dict(original.__annotations__)
    if fits is None:
        return {'forward': forward}
    # A decision by what a child returns is checked where it is taken, and so found out on a copy beforehand.
    scope[FITS] = tried(fits, forward) if check in scope.values() else fits
    return {'forward': forward, FITS: scope[FITS]}


def _filename(edit: Edit) -> str:
    what = repr((edit.source, edit.inserted, edit.operation))
    return f'<sem_timm {edit.base.__qualname__} {zlib.crc32(what.encode()):08x}>'


def _reduce_ex(self: nn.Module, protocol: int) -> Any:
    # The class is made at run time, so a copy or a pickle names its ingredients instead of it.
    edit = edit_of(self)
    if edit is None:  # somebody derived a class from a patched one, and answers for it
        return nn.Module.__reduce_ex__(self, protocol)
    base: Any = edit.base
    state, *others = base.__reduce_ex__(self, protocol)[2:]
    # The classes of further cases are made at run time as well, and again where they are needed.
    state = {key: value for key, value in state.items() if key != CASES} if isinstance(state, dict) else state
    return (_restored, (_portable(edit),), state, *others)


def _restored(portable: tuple[Any, ...]) -> nn.Module:
    base, source, bindings, *rest = portable
    named = tuple((name, import_module(value) if is_module else value) for name, is_module, value in bindings)
    cls = patched_class(Edit(base, source, named, *rest))
    module: nn.Module = cls.__new__(cls)
    return module


def _portable(edit: Edit) -> tuple[Any, ...]:
    """An edit for pickling; modules, which do not pickle, by name."""
    bindings = tuple(
        (name, True, value.__name__) if isinstance(value, ModuleType) else (name, False, value)
        for name, value in edit.bindings
    )
    return (edit.base, edit.source, bindings, edit.inserted, edit.position, edit.operation)
