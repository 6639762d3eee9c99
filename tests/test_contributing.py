"""What CONTRIBUTING.md says: the house as it is built, and how-tos that are followed word for word in a copy."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sem_timm
from sem_timm.command_line import main
from tests.refusal_wordings import wordings
from tests.thorough import thorough

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sem_timm.__file__).parent
GUIDE = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')

# The rooms of which the guide tells every file.
INNER = (PACKAGE / 'meta', PACKAGE / 'surgery')

# Files at the top that are no rooms: the door, and two ways to start the package.
DOORS = {'__init__', '__main__', 'run'}


def rooms_of_the_guide() -> dict[str, set[str]]:
    """The table of rooms, from top to bottom: what each of them imports."""
    rows = re.findall(r'^\| `(\w+)` \|[^|]*\|([^|]*)\|$', GUIDE, re.MULTILINE)
    return {room: set(re.findall(r'`(\w+)`', imports)) for room, imports in rows}


def imported_rooms(path: Path) -> Iterator[str]:
    """The first part of the names that a file imports from the package, behind its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f'{path}: relative import'
            of_package = node.module == 'sem_timm'
            names = [f'sem_timm.{alias.name}' for alias in node.names] if of_package else [node.module]
        # ``import sem_timm`` alone is for the version, and for the path of the package.
        yield from (name.split('.')[1] for name in names if name.startswith('sem_timm.'))


def imports_between_rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob('*.py'):
        room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        if room not in DOORS:
            found.setdefault(room, set()).update(set(imported_rooms(path)) - {room})
    return found


def test_rooms_and_their_imports_are_those_of_the_guide() -> None:
    assert imports_between_rooms() == rooms_of_the_guide()


def test_imports_go_down_only() -> None:
    rooms = rooms_of_the_guide()
    order = list(rooms)
    upward = [(room, other) for room in rooms for other in rooms[room] if order.index(other) <= order.index(room)]
    assert upward == []
    assert not {'layers', 'operations'} & rooms['surgery'] and 'surgery' not in rooms['layers']


def test_the_guide_names_the_files_of_the_inner_rooms() -> None:
    (table,) = re.findall(r'^\| files \|.*?\n\n', GUIDE, re.MULTILINE | re.DOTALL)
    files = re.findall(r'`([\w/]+)`', re.sub(r'\|[^|]*\|$', '', table, flags=re.MULTILINE))
    found = {path.relative_to(PACKAGE).with_suffix('').as_posix() for room in INNER for path in room.rglob('*.py')}
    assert set(files) == {name for name in found if not name.endswith('__init__')}


def test_rooms_above_enter_surgery_and_meta_by_their_doors() -> None:
    inner = re.compile(r'^\s*(?:from|import) sem_timm\.(?:surgery|meta)\.', re.MULTILINE)
    above = [path for path in PACKAGE.rglob('*.py') if not any(room in path.parents for room in INNER)]
    assert [path.name for path in above if inner.search(path.read_text(encoding='utf-8'))] == []


def test_table_of_refusals_is_what_the_code_says() -> None:
    rows = re.findall(r'^\| `([^`]+)` \| `(surgery/[\w/]+\.py)` \| \S.*\|$', GUIDE, re.MULTILINE)
    assert len(rows) == len(set(rows)) > 90
    assert wordings() - set(rows) == set(), 'refusals without a row'
    assert set(rows) - wordings() == set(), 'rows without a refusal'


def without_numbers_of_lines(printed: str) -> list[str]:
    """The words of an explanation; the numbers are those of one version of timm, and tables are as wide as they are."""
    return re.sub(r'(?<=py:)[\d-]+|^ *\d+(?=  |:)|[- ]{2,}', ' ', printed, flags=re.MULTILINE).split()


def test_example_of_a_refusal_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    ((command, shown),) = re.findall(r'^\$ sem-timm (explain .*)\n```\n\n```text\n([^`]*)```', GUIDE, re.MULTILINE)
    assert main(command.split()) == 0
    assert without_numbers_of_lines(capsys.readouterr().out) == without_numbers_of_lines(shown)


def follow(folder: Path) -> list[str]:
    """Does to a copy of the package what the blocks with a title say; returns the files that were touched."""
    touched = []
    for kind, title, block in re.findall(r'^```(\w+) title="(.+?)"\n(.*?)^```', GUIDE, re.MULTILINE | re.DOTALL):
        path = folder / title
        if kind == 'python':
            assert not path.exists()
            path.write_text(block)
        else:
            lines = block.splitlines(keepends=True)
            old, new = (''.join(line[1:] for line in lines if line[0] in signs) for signs in (' -', ' +'))
            text = path.read_text()
            assert text.count(old) == 1, f'{title} has no such lines:\n{old}'
            path.write_text(text.replace(old, new))
        touched.append(title)
    return touched


@pytest.fixture(scope='module')
def copy_with_how_tos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp('copy')
    for part in (PACKAGE, ROOT / 'tests'):
        shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'pyproject.toml', folder)
    return folder, follow(folder)


def run_there(folder: Path, *command: str) -> str:
    environment = {**os.environ, 'PYTHONPATH': str(folder)}
    result = subprocess.run(
        [sys.executable, '-m', *command], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@thorough
def test_how_tos_pass_the_tests_they_name(copy_with_how_tos: tuple[Path, list[str]]) -> None:
    folder, touched = copy_with_how_tos
    assert len(touched) == 12
    files = ['layers/test_excitation.py', 'layers/test_attention_core.py', 'surgery/test_stage_ends.py']
    names = 'tanh or cosine or last_blocks or the_attentions'
    chosen = [f'tests/{name}' for name in [*files, 'swap/test_attentions.py']]
    printed = run_there(folder, 'pytest', '-q', '-p', 'no:cacheprovider', '-k', names, *chosen)
    assert int(re.findall(r'(\d+) passed', printed)[0]) > 20


def test_how_tos_pass_lint_and_format(copy_with_how_tos: tuple[Path, list[str]]) -> None:
    folder, touched = copy_with_how_tos
    run_there(folder, 'ruff', 'check', '--no-cache', *touched)
    run_there(folder, 'ruff', 'format', '--no-cache', '--check', *touched)
