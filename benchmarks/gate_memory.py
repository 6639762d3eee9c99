"""For how many sites of SEM nothing has to be kept for the gate, by what computes the tensor that is gated.

    python -m benchmarks.gate_memory                  # every architecture of timm; goes on where it was stopped
    python -m benchmarks.gate_memory resnet50 'vit_*' # some of them, printed

From the folder of the repository. On the meta device and in training mode, at the size that a model is made for, so
weights and a GPU are not needed. The result is docs/gate_memory.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import sem_timm
from benchmarks.common.meta import create_on_meta, own_architectures
from benchmarks.common.run_log import continued, read_log
from benchmarks.zoo import VERSIONS
from sem_timm.layers import ChannelGate
from sem_timm.layers.gated_sum import follows

LOG = Path('build/gate_memory.jsonl')
PAGE = Path('docs/gate_memory.md')

# What moves numbers and computes none, and what steps of a backward are steps of.
MOVING = (
    'View',
    'UnsafeView',
    'ReshapeAlias',
    'Permute',
    'Transpose',
    'Clone',
    'Squeeze',
    'Unsqueeze',
    'Slice',
    'ToCopy',
)
STEPS = {
    'NativeBatchNorm': 'batch norm',
    'NativeLayerNorm': 'layer norm',
    'NativeGroupNorm': 'group norm',
    'Mul': 'product, such as layer scale',
    'Addmm': 'linear layer',
    'Mm': 'linear layer',
    'Bmm': 'product of matrices',
    'UnsafeBmm': 'product of matrices',
    'Convolution': 'convolution',
    'Add': 'sum',
    'Cat': 'concatenation',
    'Alias': 'slice',
    'Silu': 'activation',
    'Gelu': 'activation',
    'Hardswish': 'activation',
    'Relu': 'activation',
    'LeakyRelu': 'activation',
}

_HEAD = """# Memory of a gate

A gate scales a tensor, and the gradient of the gate reads that tensor: in training, one more activation of each block
would be kept. Where the tensor follows from what is kept anyway, nothing is kept for the gate
([how](how_it_works.md#a-gate-keeps-no-activation)).

That holds for this many sites, in {architectures:,} architectures of timm {timm}, by what computes the tensor, with an
active drop path behind it or none, in float32. Made by `python -m benchmarks.gate_memory`.

| computed by | sites | nothing kept | in architectures |
|---|---:|---:|---:|
"""


@dataclass
class Endings:
    """What the gated tensors of one architecture are computed by.

    Attributes:
        architecture: Its name.
        served: For how many sites nothing is kept, by what computes the tensor.
        others: The other sites.
        error: Why it could not be run, if it could not.
        versions: Of sem_timm, timm and torch.
    """

    architecture: str
    served: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    error: str = ''
    versions: dict[str, str] = field(default_factory=lambda: VERSIONS)


def look_at(architecture: str) -> Endings:
    """Runs an architecture with SEM once in training mode."""
    found = Endings(architecture)
    model = sem_timm.patch_model(create_on_meta(architecture)).train()
    served, others = Counter[str](), Counter[str]()
    for gate in model.modules():
        if isinstance(gate, ChannelGate):
            gate.register_forward_pre_hook(partial(note, served=served, others=others), with_kwargs=True)
    try:
        model(torch.empty(2, *sem_timm.patched_modules(model)[0].input_size, device='meta', requires_grad=True))
    except Exception as error:  # the models are anybody's
        found.error = f'{type(error).__name__}: {str(error)[:200]}'
    found.served, found.others = dict(served), dict(others)
    return found


def note(gate: ChannelGate, args: Any, kwargs: Any, served: Counter[str], others: Counter[str]) -> None:
    """Counts one call of a gate."""
    x, shortcut = args[0], args[1] if len(args) > 1 else None
    free = follows(x, shortcut, gate.channel_dim) is not None or is_kept_by_its_own_step(x)
    (served if free else others)[step_of(x)] += 1


def is_kept_by_its_own_step(x: Tensor) -> bool:
    """Whether what computed a tensor keeps it as well, as a rectifier does."""
    result = getattr(x.grad_fn, '_saved_result', None)
    return isinstance(result, Tensor) and result.untyped_storage()._cdata == x.untyped_storage()._cdata


def step_of(x: Tensor) -> str:
    """What computed a tensor, as people call it."""
    node: Any = x.grad_fn
    while node is not None:
        name = node.name().partition('Backward')[0]
        is_drop_path = name == 'Mul' and node._saved_self is None and node._saved_other is not None
        if name not in MOVING and not is_drop_path:
            return STEPS.get(name, name)
        node = node.next_functions[0][0]
    return 'nothing'


def sweep(names: list[str], log: Path) -> Iterator[Endings]:
    """Of all architectures; what an earlier run with the same versions left in the log is not done again."""
    logged = [Endings(**record) for record in read_log(log) if record['versions'] == VERSIONS]
    return continued(names, {row.architecture: row for row in logged}, look_at, log)


def page(rows: list[Endings]) -> str:
    """The table."""
    served, others, where = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        served.update(row.served)
        others.update(row.others)
        where.update({*row.served, *row.others})
    total = served + others
    text = _HEAD.format(architectures=len(rows), timm=VERSIONS['timm'])
    rare = [name for name in total if total[name] < 100]
    for name, count in total.most_common():
        if name not in rare:
            text += f'| {name} | {count:,} | {served[name]:,} | {where[name]:,} |\n'
    if rare:
        architectures = len([row for row in rows if {*row.served, *row.others} & {*rare}])
        text += f'| others | {sum(total[n] for n in rare):,} | {sum(served[n] for n in rare):,} | {architectures:,} |\n'
    return text + f'| all | {total.total():,} | {served.total():,} | {len(rows):,} |\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('patterns', nargs='*', help='names, with wildcards; all architectures by default')
    parser.add_argument('--log', type=Path, default=LOG, help='a line for each architecture that is done')
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [n for n in own_architectures() if not args.patterns or any(fnmatch.fnmatch(n, p) for p in args.patterns)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rows = list(track(sweep(names, args.log), total=len(names)))
    for row in rows:
        if row.error or args.patterns:
            print(row.architecture, row.served, row.others, row.error)
    text = page(rows)
    print(text)
    if not args.patterns:
        PAGE.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
