"""Runs a script with the variants registered: ``python -m sem_timm.run train.py --model resnet50_sem ...``.

For scripts that know timm but not this package. ``-m module`` runs a module instead. Under a launcher:
``torchrun --nproc-per-node 2 -m sem_timm.run train.py ...``.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

_USAGE = 'usage: python -m sem_timm.run SCRIPT [ARGUMENTS]   or   python -m sem_timm.run -m MODULE [ARGUMENTS]'


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script that is named first, as Python itself would, with the arguments behind it.

    Returns:
        The exit code, 2 if there is no such script; a script that exits by itself does so with its own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_module = given[:1] == ['-m']
    rest = given[1:] if is_module else given
    if not rest or rest[0] in ('-h', '--help'):
        print(_USAGE, file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    if not is_module and not os.path.exists(rest[0]):
        print(f'sem_timm.run: there is no script {rest[0]!r}. {_USAGE}', file=sys.stderr)
        return 2
    sys.argv = rest
    if is_module:
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(rest[0])))
        runpy.run_path(rest[0], run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
