"""Brings the tables of docs/adapters.md up to those of comparisons, which `sem-timm compare` has made.

    python benchmarks/adapters.py comparisons/fashion-mnist-100 comparisons/solar-cells-100

The commands that make them are on that page. Each table, and each sentence below it, is compare's own. The name of the
folder tells where it goes: between the comments `<!-- comparison: NAME -->` and `<!-- end -->`. The numbers of every
run go to docs/adapters/NAME.json, the log to NAME.jsonl, from which a comparison can go on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parents[1] / 'docs'
PAGE = DOCS / 'adapters.md'
END = '<!-- end -->'


def begin(name: str) -> str:
    """The comment before a table."""
    return f'<!-- comparison: {name} -->'


def section(results: str) -> str:
    """What the page takes of the file results.md of a comparison: all but the heading."""
    return results.partition('\n\n')[2].strip()


def filled(page: str, name: str, text: str) -> str:
    """The page with a text between the comments of a comparison."""
    pattern = re.compile(f'(?<={re.escape(begin(name))}\n).*?(?={END})', re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f'{PAGE.name} has no place for {name}: {begin(name)} and {END}, each on a line of its own.')
    return pattern.sub(lambda _: f'\n{text}\n\n', page, count=1)


def main() -> None:
    """Writes the page and the files of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path, help='folders that `sem-timm compare` wrote')
    for folder in parser.parse_args().folders:
        results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
        text = section((folder / 'results.md').read_text(encoding='utf-8'))
        PAGE.write_text(filled(PAGE.read_text(encoding='utf-8'), folder.name, text), encoding='utf-8')
        numbers = DOCS / PAGE.stem / f'{folder.name}.json'
        numbers.parent.mkdir(exist_ok=True)
        numbers.write_text(json.dumps({**results, 'folder': folder.name}, indent=1) + '\n', encoding='utf-8')
        shutil.copyfile(folder / 'log.jsonl', numbers.with_suffix('.jsonl'))
        if numbers.with_suffix('.png').exists():  # the page shows it
            shutil.copyfile(folder / 'results.png', numbers.with_suffix('.png'))
        print(f'{folder.name}: {len(results["rows"])} rows, {results["pending"]} runs still to be done')


if __name__ == '__main__':
    main()
