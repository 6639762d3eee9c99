"""The wordings of all refusals in `sem_timm.surgery`, as its source has them: constant parts, and … for the others.

Those are what is raised, and what is said of sums that are no residual adds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sem_timm

SURGERY = Path(sem_timm.__file__).parent / 'surgery'
CLASSES = ('Refused', 'NoCore', 'NotACore', 'TraceError')


def wordings() -> set[tuple[str, str]]:
    """Each wording with the file that has it, from 'surgery' on; those that only pass a text on are left out."""
    return {
        (wording, f'surgery/{path.relative_to(SURGERY).as_posix()}')
        for path in SURGERY.rglob('*.py')
        for wording in _wordings(ast.parse(path.read_text(encoding='utf-8')), path.name == 'residual.py')
        if re.search('[a-z]', wording)
    }


def _wordings(tree: ast.Module, judges: bool) -> Iterator[str]:
    if judges:  # all of its sentences are reasons
        yield from (text for text in _texts(tree) if ' ' in text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _name(node.exc.func) in CLASSES:
            yield from _written(node.exc.args[0], tree)


def _texts(node: ast.AST) -> Iterator[str]:
    """All texts of some code but docstrings."""
    if isinstance(node, (ast.Constant, ast.JoinedStr)):
        yield _text(node, {})
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, 'attr', '')


def _written(text: ast.expr, tree: ast.Module) -> Iterator[str]:
    """What the text of an exception is, of a file's syntax tree; one for each place that it may come from."""
    if isinstance(text, ast.Name):
        yield from (_text(value, {}) for value in _constants(text.id))
    elif isinstance(text, ast.Attribute):  # set by whoever makes the object, in the same file
        keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == text.attr)
        yield from (_text(keyword.value, {}) for keyword in keywords)
    elif isinstance(text, ast.Call):
        made = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == _name(text.func)]
        names = [argument.arg for function in made for argument in function.args.args]
        (returned,) = [node.value for f in made for node in f.body if isinstance(node, ast.Return)] or [None]
        yield '…' if returned is None else _text(returned, dict(zip(names, text.args)))
    else:
        yield _text(text, {})


def _constants(name: str) -> Iterator[ast.expr]:
    """What a constant of some module of the surgery holds."""
    for path in SURGERY.rglob('*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                yield node.value


def _text(value: ast.expr, arguments: dict[str, ast.expr]) -> str:
    """A text with … for what is not constant; arguments of the function that made it are put in."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        parts = [_text(part, arguments) for part in value.values]
        return re.sub(r'…(\s*…)+', '…', ' '.join(''.join(parts).split()))
    inner = value.value if isinstance(value, ast.FormattedValue) else value
    given = arguments.get(inner.id) if isinstance(inner, ast.Name) else None
    return _text(given, {}) if given is not None else '…'
