"""Tables of Markdown whose columns are aligned, so that the file can be read as it is."""

from __future__ import annotations

from collections.abc import Sequence


def piped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column is aligned to the left, all others to the right."""
    lines = [header, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
    text = ['| ' + ' | '.join(t.ljust(w) if not i else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths))) + ' |'
            for row in lines]  # fmt: skip
    rule = '|' + '|'.join('-' * (w + 2) if not i else '-' * (w + 1) + ':' for i, w in enumerate(widths)) + '|'
    return [text[0], rule, *text[1:]]
