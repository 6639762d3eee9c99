"""Brings the figures that README.md quotes up to those of a result file.

    python benchmarks/quoting.py docs/benchmarks/DATE.json

The table of its section "Speed" is written anew, with what the file has of `QUOTED`, and so are the links to the file.
`everything.py` does this after it has measured.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / 'README.md'
QUOTED = (
    'SEM + add / SE + add, 8x256x56x56 contiguous',
    'SEM + add / SE + add, 8x1024x14x14 contiguous',
    'resnet50, SEM / SE, forward',
    'resnet50, SEM / plain, forward',
    'resnet50, SEM / SE, forward + backward',
    'resnet50, SEM / plain, forward + backward',
    'resnet50, SEM / SE, peak memory',
    'resnet50, SEM / plain, peak memory',
    'regnety_008, SEM / plain, peak memory',
    'efficientnet_b0, SEM / plain, peak memory',
    'mobilenetv3_large_100, SEM / plain, peak memory',
    'convnext_tiny, SEM / plain, forward + backward',
    'convnext_tiny, SEM / plain, peak memory',
    'vit_small_patch16_224, SEM / plain, forward + backward',
    'vit_small_patch16_224, SEM / plain, peak memory',
    'external / original, 196 tokens',
    'external / original, 1,024 tokens',
    'external / original, 4,096 tokens',
    'external / original, 9,216 tokens',
    'external / original, 224 px, forward + backward',
    'import sem_timm / import timm',
    'patch resnet50 / create it, first',
    'patch resnet50 / create it, second',
)
_TABLE = re.compile(r'(^\|[-:| ]+\|\n)(?:\|.*\n)*', re.MULTILINE)
_LINK = re.compile(r'docs/benchmarks/\d{4}-\d\d-\d\d\.')


def quoted(text: str, results: dict[str, Any], date: str) -> str:
    """The text of the README with the figures of one result file, those of a CPU."""
    lines = {name: line for part in results.get('cpu', {}).values() for name, line in part['lines'].items()}
    rows = [_row(name, lines[name]) for name in QUOTED if name in lines]
    before, title, rest = text.partition('\n## Speed\n')
    section, following, after = rest.partition('\n## ')
    section = _TABLE.sub(lambda match: match[1] + ''.join(rows), section)
    return before + title + _LINK.sub(f'docs/benchmarks/{date}.', section) + following + after


def _row(name: str, line: dict[str, Any]) -> str:
    if line['goal'] is None:
        return f'| {name} | {line["value"]:.2f} | |\n'
    missed = ', missed' if line['value'] > line['goal'] else ''
    return f'| {name} | {line["value"]:.2f} | {line["goal"]:.2f}{missed} |\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('figures', type=Path, help='result file')
    args = parser.parse_args()
    README.write_text(quoted(README.read_text(), json.loads(args.figures.read_text()), args.figures.stem))


if __name__ == '__main__':
    main()
