"""Which modules a target or exclude means; the rules are PEFT's.

A string is a regular expression that must match a module's whole name; a list holds exact names or dotted suffixes; a
type and a callable ``(name, module) -> bool`` also serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from sem_timm.errors import NoMatchError, OptionError, closest

Target = str | Sequence[str] | type | Callable[[str, nn.Module], bool]


def select(model: nn.Module, target: Target, role: str = 'target') -> list[tuple[str, list[str]]]:
    """Resolves a target to module names.

    Args:
        model: The model whose modules are meant.
        target: What to select, by the rules above.
        role: 'target' or 'exclude', for messages.

    Returns:
        One pair for each entry of the target: the entry as text, and the names it selects.

    Raises:
        NoMatchError: If the target, or one entry of a list, selects nothing.
        OptionError: If the target is of none of these kinds or not a valid regular expression.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target, str):
        found = [(repr(target), _by_pattern(target, modules, role))]
    elif isinstance(target, type):
        found = [(target.__name__, [name for name, module in modules.items() if isinstance(module, target)])]
    elif callable(target):
        label = getattr(target, '__name__', 'a callable')
        found = [(label, [name for name, module in modules.items() if target(name, module)])]
    elif isinstance(target, (list, tuple, set, frozenset)) and target and all(isinstance(t, str) for t in target):
        found = [(repr(entry), _by_name(entry, modules)) for entry in target]
    else:
        raise OptionError(
            f'{role}={target!r} is none of: a regular expression over module names, a list of names or dotted '
            "suffixes, a module class, a callable (name, module) -> bool. Example: target=r'layer[34]\\..*'."
        )
    for entry, names in found:
        if not names:
            raise NoMatchError(_no_match(model, entry, role, modules))
    return found


def _by_pattern(pattern: str, modules: dict[str, nn.Module], role: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise OptionError(f'{role}={pattern!r} is not a regular expression: {error}.') from error
    return [name for name in modules if compiled.fullmatch(name)]


def _by_name(entry: str, modules: dict[str, nn.Module]) -> list[str]:
    # Names read off a compiled or distributed model carry a prefix that the model itself does not have.
    for wanted in (entry, re.sub(r'^(module\.|_orig_mod\.)+', '', entry)):
        names = [name for name in modules if name == wanted or name.endswith('.' + wanted)]
        if names:
            return names
    return []


def _no_match(model: nn.Module, entry: str, role: str, modules: dict[str, nn.Module]) -> str:
    plain = re.sub(r'[\\^$()*+?\[\]|]', '', entry.strip("'")).rstrip('.')
    depth = plain.count('.')
    candidates = [name for name in modules if name.count('.') <= depth]
    return (
        f'{role} {entry} matches no module of {type(model).__name__}.\n'
        f'  {closest(plain, candidates)} plan_model(model) lists the blocks that can be operated on.'
    )
