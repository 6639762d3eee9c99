"""Why a module is refused: the file of ours that decided, and the line of the model's own code that it is about.

Both are read off the exception, from where it was raised and from what the code there was looking at, so that no table
has to say it again.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from sem_timm.errors import from_package
from sem_timm.reports.listing import line_of
from sem_timm.surgery import Core, ResidualAdd, Verdict

_PACKAGE = Path(__file__).parents[1]
_STANDARD_LIBRARY = Path(traceback.__file__).parent


@dataclass(frozen=True)
class Reason:
    """Why a module is refused.

    Attributes:
        text: The reason.
        decided_by: The file of this package that decided, such as 'surgery/residual.py'.
        line: The line of the model's own code that is concerned, as 'file:line: code'; empty where there is none.
    """

    text: str
    decided_by: str
    line: str = ''


def reason_of(error: Exception, verdicts: Iterable[Verdict[Any]] = ()) -> Reason:
    """What an exception says of a refusal.

    Args:
        error: The exception that refused.
        verdicts: What became of the nodes that were looked at before.
    """
    chain = list(_causes(error))
    # Who refuses may only pass on what another one said.
    decided = [each for each in chain if _is_own(type(each).__module__)][-1]
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(decided.__traceback__)]
    inside = [Path(file).relative_to(_PACKAGE).as_posix() for file in files if Path(file).is_relative_to(_PACKAGE)]
    node = next((verdict.node for verdict in verdicts if verdict.cause in chain), None) or _looked_at(decided)
    line = line_of(node) if node is not None else next(filter(None, map(_foreign_line, reversed(chain))), '')
    return Reason(str(error), inside[-1] if inside else '', line)


def _is_own(module: str) -> bool:
    return module.split('.')[0] == 'sem_timm'


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _looked_at(error: BaseException) -> fx.Node | None:
    """The sum or attention core that the code which raised an error had in its hands."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, ResidualAdd):
                return value.add
            if isinstance(value, Core):
                return value.output
    return None


def _foreign_line(error: BaseException) -> str:
    """The innermost line of other people's code that an error came through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        of_python = file.is_relative_to(_STANDARD_LIBRARY) and 'site-packages' not in file.parts
        if not of_python and '/torch/' not in frame.filename and not file.is_relative_to(_PACKAGE) and frame.line:
            return f'{from_package(frame.filename)}:{frame.lineno}: {frame.line}'
    return ''
