"""What became of each sum and of each softmax of a module's forward, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from sem_timm.reports.listing import Listing, place_of
from sem_timm.surgery import (
    Core,
    Reading,
    Refused,
    ResidualAdd,
    Swapper,
    Verdict,
    heads_of,
    judged_sums,
    last_of_each_output,
)


@dataclass(frozen=True)
class Finding:
    """One sum or softmax that was looked at, and what became of it.

    Attributes:
        code: Its statement.
        place: File and line in the model's own code.
        accepted: Whether it is a residual add, or an attention core.
        text: What it is, or why it is none.
    """

    code: str
    place: str
    accepted: bool
    text: str


def findings_of_sums(reading: Reading, module: nn.Module, listing: Listing) -> tuple[Finding, ...]:
    """What became of each sum of a module's forward, in eval mode."""
    graph, values = reading.trace.graphs[False], reading.values[False]
    last = {add.add for add in last_of_each_output(graph, reading.adds[False])}

    def told(add: ResidualAdd) -> str:
        branch, shortcut = listing.name(add.branch), listing.name(add.shortcut)
        part = 'a slice of ' if add.partial else ''
        later = '' if add.add in last else "; a later one follows, and branches='last' takes that"
        return f'a residual add: {part}the branch {branch} to the shortcut {shortcut}{later}'

    return tuple(_finding(verdict, listing, told) for verdict in judged_sums(graph, module, values))


def findings_of_softmaxes(
    verdicts: Iterable[Verdict[Core]], swapper: Swapper, module: nn.Module, listing: Listing
) -> tuple[Finding, ...]:
    """What became of each softmax and call of attention of a module's forward, in eval mode."""

    def told(core: Core) -> str:
        names = [listing.name(node) for node in (core.query, core.key, core.value)]
        parts = ['a core of the queries {}, keys {} and values {}'.format(*names), _scale(core, listing)]
        extras = [f'{listing.name(extra.node)} ({extra.how})' for extra in core.extras]
        parts += [f'into its logits go {", ".join(extras)}'] if extras else []
        parts += ['it is causal'] if core.is_causal else []
        parts += [_heads(core, module, listing), _mask(core, swapper, module, listing)]
        return '; '.join(parts)

    return tuple(_finding(verdict, listing, told) for verdict in verdicts)


def _finding(verdict: Verdict[Any], listing: Listing, told: Any) -> Finding:
    node: fx.Node = verdict.node
    accepted = verdict.found is not None
    return Finding(listing.code(node), place_of(node), accepted, told(verdict.found) if accepted else verdict.reason)


def _scale(core: Core, listing: Listing) -> str:
    if core.scale.refusal:
        return core.scale.refusal
    factors = [f'{"over" if divides else "times"} {listing.name(node)}' for node, divides in core.scale.factors]
    return ' '.join([f'its products times {core.scale.of_products:.4g}', *factors])


def _heads(core: Core, module: nn.Module, listing: Listing) -> str:
    try:
        heads, axis = heads_of(core, module, listing.values)
    except Refused as reason:
        return str(reason)
    return 'one head, or all folded into the batch' if heads == 1 else f'{heads} heads on axis {axis}'


def _mask(core: Core, swapper: Swapper, module: nn.Module, listing: Listing) -> str:
    try:
        mask = swapper.mask(core, module, listing.values)
    except Refused as reason:
        return str(reason)
    if mask is None:
        return 'no mask is handed on'
    return f'{listing.name(mask.node)} is handed on as its mask ({mask.how})'
