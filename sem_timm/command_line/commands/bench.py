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
_FOLDERS = [root / 'benchmarks' for root in _ROOTS if (root / 'benchmarks' / 'everything.py').is_file()]


_ALL = 'everything'


def command(
    name: Annotated[str | None, typer.Argument(help='One benchmark; without a name, all that have a goal.')] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="The benchmark's own arguments, after --.")] = None,
    listed: Annotated[bool, typer.Option('--list', help='List the benchmarks.')] = False,
    device: Annotated[str | None, typer.Option(help='cpu or cuda.')] = None,
    out: Annotated[Path | None, typer.Option(help='Where results go; for all, a folder.')] = None,
    zoo: Annotated[bool, typer.Option('--zoo', help="Also plan all of timm's architectures: minutes.")] = False,
    quick: Annotated[
        bool, typer.Option('--quick', help='Tiny sizes: shows that it works; all parts together need --out.')
    ] = False,
) -> None:
    """Measure every ratio that has a goal, into a dated result file and a plot; or run one benchmark.

    Needs a clone of the repository, where the folder benchmarks/ is.

    Examples: `sem-timm bench`, `sem-timm bench --list`, `sem-timm bench gate`, `sem-timm bench models -- --help`.
    """
    scripts = {path.stem: path for path in sorted(_FOLDERS[0].glob('*.py'))} if _FOLDERS else {}
    if not scripts:
        raise OptionError(
            'benchmarks are scripts in the folder benchmarks/ of the repository, which is not part of an installed '
            "package. Get a clone, and there: pip install -e '.[bench]'"
        )
    if listed:
        for script, path in scripts.items():
            title = (ast.get_docstring(ast.parse(path.read_text('utf-8'))) or '').splitlines()[:1]
            print(f'{script:20}{"".join(title)}')
        return
    name = name or _ALL
    if name not in scripts:
        raise OptionError(f'benchmark {name!r} is unknown. {closest(name, scripts)}')
    typed = ['--zoo'] * zoo + ['--quick'] * quick
    typed += ['--device', device] if device else []
    typed += ['--out', str(out.absolute())] if out else []
    code = subprocess.call([sys.executable, str(scripts[name]), *typed, *(arguments or ())])
    raise typer.Exit(code)
