"""Random residual blocks, as the Python source of their classes: what a block is called with and returns."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from textwrap import indent
from typing import Literal

from tests.robustness.statements import write_statements
from tests.robustness.writer import Writer

Layout = Literal['NCHW', 'NHWC', 'NLC']

PREAMBLE = """
import functools
import operator
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

C = {channels}


class Pair(NamedTuple):
    x: Any
    other: Any


@dataclass
class Named:
    x: Any
    other: Any


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1)) >= self.rate
        return x * keep / (1 - self.rate)


class Scale(nn.Module):
    def __init__(self, *shape, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.rand(C, *shape))

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Skip(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def plus(x, y):
    return x + y


def total(parts):
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result
""".strip()


@dataclass
class Block:
    """A class of blocks.

    Attributes:
        name: Its name.
        layout: Layout of what it is given and returns.
        source: Its code.
        arguments: Its further arguments, each with the values that a caller may give.
        returns: How it returns its result.
        nested: Whether another block has it.
    """

    name: str
    layout: Layout
    source: str
    arguments: dict[str, list[str]] = field(default_factory=dict)
    keyword_only: bool = False
    returns: str = 'tensor'
    nested: bool = False

    def call(self, draw: random.Random, callee: str, extra: list[str], variable: str = 'x') -> list[str]:
        """Statements that call the block on a variable; what it returns beside goes to names that ``extra`` gets."""
        given = [variable]
        for number, (name, values) in enumerate(self.arguments.items(), 1):
            value = draw.choice([None, *values])
            if value is None:
                continue
            # One that others are left out before, or that follows one given by name, is given by name.
            by_name = self.keyword_only or len(given) != number or '=' in given[-1]
            given.append(f'{name}={value}' if by_name or draw.random() < 0.5 else value)
        call = f'{callee}({", ".join(given)})'
        if self.returns == 'tensor':
            return [f'{variable} = {call}']
        other = f'other{len(extra)}'
        extra.append(other)
        unpacked = {
            'tuple': [f'{variable}, {other} = {call}'],
            'list': [f'given = {call}', f'{variable}, {other} = given[0], given[1]'],
            'dict': [f'given = {call}', f"{variable}, {other} = given['x'], given['other']"],
            'pair': [f'given = {call}', f'{variable}, {other} = given.x, given.other'],
            'named': [f'given = {call}', f'{variable}, {other} = given.x, given.other'],
        }
        return unpacked[self.returns]


_RETURNS = {
    'tensor': 'return {x}',
    'tuple': 'return {x}, {other}',
    'list': 'return [{x}, {other}]',
    'dict': "return {{'x': {x}, 'other': {other}}}",
    'pair': 'return Pair({x}, {other})',
    'named': 'return Named({x}, other={other})',
}

# Names that generated code could trip over.
_INPUT_NAMES = ['x', 'x', 'x', 'input', 'tensor', 'add', 'out', 'sem', 'shortcut', 'x1', 'type', 'GuardError', 'device']


def write_block(draw: random.Random, layout: Layout, blocks: list[Block], depth: int = 0) -> Block:
    """Writes a block, and those it holds, and appends them to ``blocks``."""
    inner = []
    for _ in range(draw.choice([1, 1, 2]) if depth else 0):
        block = write_block(draw, layout, blocks, depth - 1)
        block.nested = True
        inner.append(block)
    name = f'Block{len(blocks)}'
    first = draw.choice(_INPUT_NAMES)
    writer = Writer(draw, layout, first)
    arguments = _draw_arguments(draw, writer)
    keyword_only = bool(arguments) and draw.random() < 0.5
    for block in inner:
        attribute = writer.child(f'{block.name}()')
        result = writer.new_name()
        writer.body += [f'{result} = {writer.tensor()}', *block.call(draw, f'self.{attribute}', [], result)]
        writer.live.append(result)
        if draw.random() < 0.5:
            writer.add()
    write_statements(writer, draw.randint(2, 5))
    if draw.random() < 0.8:
        writer.add()
    returns = draw.choice(['tensor'] * 5 + ['tuple', 'list', 'dict', 'pair', 'named'])
    ending = _RETURNS[returns].format(x=writer.live[-1], other=writer.tensor())
    # Every return in the middle returns the same form.
    body = [line.replace('RETURN', _RETURNS[returns].format(x=first, other=first)) for line in writer.body]
    header = ', '.join(['self', first, *(['*'] if keyword_only else []), *arguments])
    lines = [f'class {name}(nn.Module):', '    def __init__(self):', '        super().__init__()']
    lines += [indent(line, ' ' * 8) for line in writer.init]
    lines += ['', f'    def forward({header}):', *(indent(line, ' ' * 8) for line in [*body, ending])]
    for method in writer.methods:
        lines += ['', indent(method, ' ' * 4)]
    given = {argument.split('=')[0].strip(): writer.values[argument] for argument in arguments}
    blocks.append(Block(name, layout, '\n'.join(lines), given, keyword_only, returns))
    return blocks[-1]


def _draw_arguments(draw: random.Random, writer: Writer) -> list[str]:
    """Further arguments, as a signature spells them, with statements that use them."""
    known = {
        'scale=0.5': (['0.25'], ['{y} = {x} * scale']),
        'mask=None': (['None'], ['{y} = {x}', 'if mask is not None:', '    {y} = {y} * mask']),
        'flag=True': (['True', 'False'], ['{y} = {x}', 'if flag:', '    {y} = {y} * 2']),
        "mode='plus'": (["'plus'", "'minus'"], ["{y} = {x} if mode == 'plus' else -{x}"]),
        'steps=2': (['1', '3'], ['{y} = {x}', 'for _ in range(steps):', '    {y} = {y} * 0.9']),
        'pair=(1, 2)': (['(2, 3)'], ['{y} = {x} * pair[0]']),
    }
    chosen = draw.sample(sorted(known), draw.choice([0, 0, 0, 1, 2]))
    for argument in chosen:
        values, statements = known[argument]
        result = writer.new_name()
        tensor = writer.tensor()
        writer.body += [line.format(x=tensor, y=result) for line in statements]
        writer.live.append(result)
        writer.values[argument] = values
    return chosen
