"""Runs the Python of one page of the documentation, without a network; tests/test_documentation.py starts it.

    python tests/run_page.py PAGE          blocks follow one another, as a reader would type them
    python tests/run_page.py PAGE --apart  each block stands alone

A block that is followed by a block of ``text`` has to print that; ``...`` in it stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# Title or other words behind the language are for readers.
_BLOCK = re.compile(
    r'^```python[^\n]*\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?', re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of Python, the line of the page that it begins on, and what it prints, if the page says so."""

    code: str
    line: int
    output: str | None


def blocks_of(page: str) -> list[Block]:
    """The blocks of Python of a page, in order."""
    return [
        Block(match['code'], page.count('\n', 0, match.start()) + 2, match['output']) for match in _BLOCK.finditer(page)
    ]


def run(block: Block, path: Path, names: dict[str, object]) -> None:
    """Runs a block, with tracebacks that name the line of the page."""
    printed = io.StringIO()
    code = compile('\n' * (block.line - 1) + block.code, str(path), 'exec')
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    if block.output is not None:
        # Tables are as wide as they are; only the ends of lines and of the page do not show.
        got = re.sub(r' +$', '', printed.getvalue(), flags=re.MULTILINE).rstrip('\n') + '\n'
        if not doctest.OutputChecker().check_output(block.output, got, doctest.ELLIPSIS):
            raise AssertionError(f'{path}, line {block.line} prints\n{got}\nand not\n{block.output}')


def load_no_weights() -> None:
    """Lets ``pretrained=True`` mean all it means but the download: timm's loader leaves the random weights there."""
    import timm.models._builder

    assert callable(timm.models._builder.load_pretrained)
    timm.models._builder.load_pretrained = lambda *args, **kwargs: None


def main(page: str, *options: str) -> None:
    """Runs all blocks of a page."""
    load_no_weights()
    path = Path(page)
    names: dict[str, object] = {'__name__': '__main__'}
    for block in blocks_of(path.read_text(encoding='utf-8')):
        run(block, path, {'__name__': '__main__'} if '--apart' in options else names)


if __name__ == '__main__':
    main(*sys.argv[1:])
