"""Targets as they are typed, and names for the shell to complete."""

from __future__ import annotations

from collections.abc import Sequence

import timm

from sem_timm.operations import operation_names


def parse_target(names: Sequence[str] | None) -> str | tuple[str, ...] | None:
    """One text is a regular expression, several are names; the rules of `plan_model`."""
    if not names:
        return None
    return names[0] if len(names) == 1 else tuple(names)


def complete_model(incomplete: str) -> list[str]:
    """Names of models that begin so, for the shell."""
    return timm.list_models(f'{incomplete}*')


def complete_operation(incomplete: str) -> list[str]:
    """Names of operations that begin so, for the shell."""
    return [name for name in operation_names() if name.startswith(incomplete)]
