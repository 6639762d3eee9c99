"""Random residual networks and random attention modules, patched and compared with their base in every way.

    python benchmarks/random_networks.py --count 10000 --seed 0
    python benchmarks/random_networks.py --kind attention --count 10000 --seed 0

Prints how many were patched, with how many sites, and how many were refused and why. Ends with an error if one network
is not what it was; its number shows it again: ``--seed NUMBER --count 1 --show``. A network takes about a tenth of a
second on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.robustness.attention_check import Softmax, check_attention
from tests.robustness.attention_source import random_attention
from tests.robustness.network_check import OPERATIONS, Outcome, check_network
from tests.robustness.network_source import describe, random_network

SWAPS = ('external', Softmax, 'linear', 'efficient', Softmax, 'eamlp')

# Classes and their code stay for as long as a process does, so that a process does not do too many.
_PER_PROCESS = 250


def check(job: tuple[str, int, bool]) -> tuple[int, Outcome | str]:
    """What became of one network, or the text of the error that shows it is not what it was."""
    kind, seed, show = job
    torch.set_num_threads(1)
    draw = random.Random(seed)
    try:
        if kind == 'attention':
            attention = random_attention(draw)
            if show:
                print(describe(attention.network))
            return seed, check_attention(attention, SWAPS[seed % len(SWAPS)])
        network = random_network(draw)
        if show:
            print(describe(network))
        return seed, check_network(network, list(OPERATIONS.values())[seed % len(OPERATIONS)])
    except Exception:
        return seed, traceback.format_exc()


def outcomes(arguments: argparse.Namespace) -> Iterator[tuple[int, Outcome | str]]:
    """The outcomes of all networks, as they come."""
    jobs = [(arguments.kind, arguments.seed + number, arguments.show) for number in range(arguments.count)]
    if arguments.count <= _PER_PROCESS:
        yield from map(check, jobs)
        return
    context = multiprocessing.get_context('spawn')
    with context.Pool(arguments.processes, maxtasksperchild=_PER_PROCESS, initializer=_quiet) as pool:
        yield from pool.imap_unordered(check, jobs, chunksize=1)


def _quiet() -> None:
    warnings.simplefilter('ignore')


def reason_of(text: str) -> str:
    """A reason without names and numbers, so that equal ones are counted together."""
    text = text.split('refused:\n')[-1].split('\n')[0].strip()
    text = re.sub(r'^[\w.]+: ', '', text)
    text = re.sub(r'\(<[^)]*\)|\(B, [\d, ]*\)', '…', text)
    text = re.sub(r"(changes|sets) self\.\w+|'\w+'|\d+", '#', text)
    return re.sub(r'^nothing in Net can take [\w]+; ', '', text)[:110]


def report(done: int, kinds: Counter[str], positions: Counter[str], reasons: Counter[str]) -> None:
    """Prints the figures."""
    print(f'{done:,} networks: ' + ', '.join(f'{kinds[kind]:,} {kind}' for kind in sorted(kinds)))
    print(f'{sum(positions.values()):,} sites: ' + ', '.join(f'{n:,} {name}' for name, n in positions.most_common()))
    print('Refused, modules and whole networks:')
    for reason, number in reasons.most_common(30):
        print(f'{number:7,}  {reason}')


def main() -> None:
    """Checks networks and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kind', choices=['residual', 'attention'], default='residual')
    parser.add_argument('--count', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0, help='number of the first network')
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--show', action='store_true', help='print the source of each network')
    arguments = parser.parse_args()
    _quiet()
    kinds, positions, reasons = Counter[str](), Counter[str](), Counter[str]()
    failures = 0
    for done, (seed, outcome) in enumerate(outcomes(arguments), 1):
        if isinstance(outcome, str):
            failures += 1
            print(f'network {seed}:\n{outcome}', flush=True)
        else:
            kinds[outcome.kind] += 1
            kinds.update({'guarded at another shape': outcome.guarded} if outcome.guarded else {})
            kinds.update({'not differentiable for a change in place': 1} if outcome.late else {})
            positions.update(outcome.positions)
            reasons.update(map(reason_of, outcome.reasons))
        if done % 500 == 0 and done < arguments.count:
            print(f'{done:,} done, {failures} failed', flush=True)
    report(arguments.count, kinds, positions, reasons)
    if failures:
        sys.exit(f'{failures} networks are not what they were.')


if __name__ == '__main__':
    main()
