"""``sem-timm bench``: the measurements in the repository's folder ``benchmarks``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import sem_timm
from sem_timm.errors import OptionError, closest

# The package lies in a clone, or the command is run in one; any package may install a folder of that name.
_ROOTS = (Path(sem_timm.__file__).parents[1], Path.cwd())
_FOLDERS = [root / 'benchmarks' for root in _ROOTS if (root / 'benchmarks' / 'measuring.py').is_file()]


def command(
    name: Annotated[str | None, typer.Argument(help='The benchmark to run; without one, they are listed.')] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="The benchmark's own arguments, after --.")] = None,
) -> None:
    """Run a benchmark of the repository, or list them.

    Examples: `sem-timm bench`, `sem-timm bench gate`, `sem-timm bench models -- --help`.
    """
    files = sorted(_FOLDERS[0].glob('*.py')) if _FOLDERS else []
    scripts = {path.stem: path for path in files if "'__main__'" in path.read_text('utf-8')}
    if not scripts:
        raise OptionError(
            'benchmarks are scripts in the folder benchmarks/ of the repository, which is not part of an installed '
            "package. Get a clone, and there: pip install -e '.[bench]'"
        )
    if name is None:
        for script, path in scripts.items():
            title = (ast.get_docstring(ast.parse(path.read_text('utf-8'))) or '').splitlines()[:1]
            print(f'{script:20}{"".join(title)}')
        return
    if name not in scripts:
        raise OptionError(f'benchmark {name!r} is unknown. {closest(name, scripts)}')
    code = subprocess.call([sys.executable, str(scripts[name]), *(arguments or ())])
    raise typer.Exit(code)
