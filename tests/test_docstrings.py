"""Docstrings of all that is public: every argument is described, and of layers the shapes and errors."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from torch import nn

import sem_timm

PUBLIC = {name: getattr(sem_timm, name) for name in sem_timm.__all__}


def described(public: Any, *sections: str) -> set[str]:
    """The names that stand in sections of a docstring, such as 'Args'."""
    text = inspect.getdoc(public) or ''
    bodies = re.findall(rf'^(?:{"|".join(sections)}):\n((?:    .*\n?|\n)*)', text, re.MULTILINE)
    return {name.lstrip('*') for body in bodies for name in re.findall(r'^    (\*{0,2}\w+):', body, re.MULTILINE)}


@pytest.mark.parametrize('name', PUBLIC)
def test_every_argument_is_described(name: str) -> None:
    public = PUBLIC[name]
    if isinstance(public, type) and issubclass(public, (Exception, Warning)):
        assert public.__doc__
        return
    known = {f.name for f in fields(public)} if is_dataclass(public) else set(inspect.signature(public).parameters)
    known -= {f.name for base in getattr(public, '__mro__', ())[1:] if is_dataclass(base) for f in fields(base)}
    assert known <= described(public, 'Args', 'Attributes')


@pytest.mark.parametrize('name', [name for name, public in PUBLIC.items() if inspect.isfunction(public)])
def test_what_comes_back_is_described(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ''
    returns = inspect.signature(PUBLIC[name]).return_annotation
    assert returns == 'None' or 'Returns:' in text or len(text.splitlines()) == 1


@pytest.mark.parametrize(
    'name', [name for name, public in PUBLIC.items() if isinstance(public, type) and issubclass(public, nn.Module)]
)
def test_layers_tell_shapes_and_errors(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ''
    assert 'Shape:\n' in text and 'Raises:\n' in text


def test_public_methods_have_docstrings() -> None:
    missing = [
        f'{name}.{key}'
        for name, public in PUBLIC.items()
        if isinstance(public, type)
        for key, member in vars(public).items()
        if not key.startswith('_') and (callable(member) or isinstance(member, (property, classmethod)))
        if not inspect.getdoc(getattr(public, key))
    ]
    assert missing == []
