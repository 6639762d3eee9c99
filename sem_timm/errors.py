"""What can go wrong, in one hierarchy: every error this package raises on purpose is a `SemTimmError`."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class SemTimmError(Exception):
    """Base of all errors raised on purpose.

    After any but those that end a training or a ``load_state_dict`` the model is what it was before.
    """


class OptionError(SemTimmError, ValueError):
    """An argument has no meaning: an unknown name, a value out of range, a combination that cannot be."""


class NoMatchError(SemTimmError, LookupError):
    """A target or exclude selects nothing."""


class RefusedError(SemTimmError):
    """A module was asked for by name and cannot take the operation; the message says why."""


class TraceError(SemTimmError):
    """A module's forward cannot be turned into a graph; the message names file and line."""


class ModelError(SemTimmError, TypeError):
    """The model as a whole cannot be operated on: it is wrapped, compiled or scripted, or its input is unknown."""


class PlanError(SemTimmError):
    """A plan does not fit the model it is applied to."""


class PatchFileError(SemTimmError, ValueError):
    """A patch file cannot be read, or does not fit the model; the message names the file and the field."""


class WeightsError(SemTimmError, RuntimeError):
    """A state_dict that was to be complete has none of the weights of new modules, which cannot do without.

    As after torch's own errors about a state_dict, what was read before it is loaded.
    """


class GuardError(SemTimmError, RuntimeError):
    """A rewritten forward was called in a way that what was put into it cannot serve."""


class MissingPackageError(SemTimmError, ImportError):
    """A package is needed that is not installed; the message says what installs it."""


class MissingNameError(SemTimmError, AttributeError):
    """A public name needs a package that is not installed; the message says what installs it.

    Not a `MissingPackageError`: no error can be an ImportError and also the AttributeError that ``hasattr`` expects.
    """


class SwapWarning(UserWarning):
    """A model got another attention and gives other outputs than before; the message says whether it needs training."""


class BaseWeightsWarning(UserWarning):
    """New modules meet other base weights than those they were trained with."""


def closest(name: str, known: Iterable[str]) -> str:
    """The part of a message that lists what exists, the names most like ``name`` first."""
    known = [str(entry) for entry in known]
    close = get_close_matches(name, known, n=5, cutoff=0.5)
    if close:
        return f'Close: {", ".join(close)}.'
    listed = ', '.join(known[:12]) + (', …' if len(known) > 12 else '')
    return f'There are: {listed}.' if known else 'There are none.'


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises OptionError if an option is not one of its choices, which are few enough to be listed."""
    if value not in choices:
        close = get_close_matches(str(value), choices, cutoff=0.5)
        hint = f'Close: {", ".join(close)}. ' if close else ''
        raise OptionError(f'{name}={value!r} is unknown. {hint}There are: {", ".join(map(repr, choices))}.')


def place_of(error: Exception) -> str:
    """The text of an error with the line of other people's code that caused it."""
    where = line_of(traceback.extract_tb(error.__traceback__))
    text = str(error).split('\n', 1)[0]
    if isinstance(error, KeyError) or not text:  # whose text is the key alone
        text = f'{type(error).__name__}: {text}'
    text = text if len(text) <= 160 else f'{text[:160]} …'  # torch explains some things at length
    return f'{text} ({where})' if where else text


def line_of(frames: traceback.StackSummary) -> str:
    """The innermost of some frames that is neither torch's nor one that reads a model, as 'file:line: code'."""
    for frame in reversed(frames):
        if not is_between(frame.filename) and frame.line:
            return f'{from_package(frame.filename)}:{frame.lineno}: {frame.line}'
    return ''


def is_between(file: str) -> bool:
    """Whether a file is torch's, or one of those that read a model: what runs between a forward and a graph."""
    return '/torch/' in file or '/sem_timm/surgery/' in file or '/sem_timm/meta/' in file


def from_package(file: str) -> str:
    """A file from its package on: it is shown to people, and the place of site-packages is nobody's business."""
    return file.rsplit('site-packages/', 1)[-1]
