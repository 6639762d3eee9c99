"""Random small residual networks, as the Python source of their classes.

Blocks keep the shape of what they are given, so anything may follow anything. Everything is drawn from a
`random.Random`, so that one number, or a property-based test that shrinks, stands for a network.
"""

from __future__ import annotations

import linecache
import random
import zlib
from dataclasses import dataclass, field
from textwrap import indent
from types import ModuleType

import torch
from torch import nn

from tests.robustness.block_source import PREAMBLE, Block, Layout, write_block
from tests.robustness.writer import CHANNELS


@dataclass(frozen=True)
class Network:
    """One random network.

    Attributes:
        source: Code of its classes.
        layouts: Layout inside each class of blocks, by its name.
        size: Shape (C, H, W) of one input.
    """

    source: str
    layouts: dict[str, Layout]
    size: tuple[int, int, int] = (3, 8, 8)
    _module: list[ModuleType] = field(default_factory=list, compare=False, repr=False)

    def build(self, seed: int = 0) -> nn.Module:
        """The network with random weights that hide nothing: no scale and no bias is zero."""
        if not self._module:
            self._module.append(_executed(self.source))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = self._module[0].__dict__['Net']()
            for parameter in model.parameters():
                if parameter.ndim <= 1:
                    nn.init.uniform_(parameter, 0.5, 1.0)
        return model


def _executed(source: str) -> ModuleType:
    name = f'random_network_{zlib.crc32(source.encode()):08x}'
    filename = f'<{name}>'
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = ModuleType(name)
    exec(compile(source, filename, 'exec', dont_inherit=True), module.__dict__)
    return module


def random_network(draw: random.Random) -> Network:
    """Draws a network of one to three blocks, some of which hold blocks themselves."""
    layout: Layout = draw.choice(['NCHW', 'NCHW', 'NHWC', 'NLC'])
    blocks: list[Block] = []
    for _ in range(draw.randint(1, 2)):
        write_block(draw, layout, blocks, depth=draw.choice([0, 0, 0, 1, 1, 2]))
    outer = [block for block in blocks if not block.nested]
    source = '\n\n'.join([PREAMBLE.format(channels=CHANNELS), *(block.source for block in blocks)])
    source += '\n\n' + _net_source(draw, layout, outer) + '\n'
    return Network(source, {block.name: block.layout for block in blocks})


_STEMS = {
    'NCHW': 'x',
    'NHWC': 'x.permute(0, 2, 3, 1)',
    'NLC': 'x.flatten(2).transpose(1, 2)',
}
_POOLED = {'NCHW': 'x.mean((2, 3))', 'NHWC': 'x.mean((1, 2))', 'NLC': 'x.mean(1)'}


def _net_source(draw: random.Random, layout: Layout, blocks: list[Block]) -> str:
    init = [f'self.stem = nn.Conv2d(3, {CHANNELS}, 3, stride=2, padding=1)', f'self.head = nn.Linear({CHANNELS}, 5)']
    body = ['x = self.stem(images)', f'x = {_STEMS[layout]}']
    stored = draw.choice(['attributes', 'attributes', 'list'])
    if stored == 'list':
        init.append(f'self.blocks = nn.ModuleList([{", ".join(f"{block.name}()" for block in blocks)}])')
    calls = list(range(len(blocks)))
    if draw.random() < 0.1:
        calls.append(draw.choice(calls))  # a block that is called twice
    early = draw.random() < 0.2
    extra: list[str] = []
    for number in calls:
        block = blocks[number]
        if stored == 'attributes' and f'self.block{number} = {block.name}()' not in init:
            init.append(f'self.block{number} = {block.name}()')
        name = f'self.block{number}' if stored == 'attributes' else f'self.blocks[{number}]'
        if draw.random() < 0.1:
            init.append(f'{name}.register_forward_hook(lambda module, args, out: out)')
        body += block.call(draw, name, extra)
        if early:
            body.append('stages.append(x)')
    body = ['stages = []', *body] if early else body
    body += _returned(draw, layout, [*extra, *(['stages[-1]'] if early else [])])
    lines = ['class Net(nn.Module):', '    def __init__(self):', '        super().__init__()']
    lines += [indent(line, ' ' * 8) for line in init]
    lines += ['', '    def forward(self, images):', *(indent(line, ' ' * 8) for line in body)]
    return '\n'.join(lines)


def _returned(draw: random.Random, layout: Layout, extra: list[str]) -> list[str]:
    head = f'self.head({_POOLED[layout]})'
    form = draw.choice(['head', 'head', 'map', 'tuple', 'dict', 'pair'])
    if form == 'head' and not extra:
        return [f'return {head}']
    if form == 'map' and not extra:
        return ['return x']
    if form == 'dict':
        entries = [f"'extra{number}': {name}" for number, name in enumerate(extra)]
        return [f"return {{'x': x, {''.join(entry + ', ' for entry in entries)}'logits': {head}}}"]
    if form == 'pair':
        return [f'return Pair({head}, [x, {", ".join(extra)}])']
    return [f'return {head}, x, {", ".join(extra)}'.rstrip(', ')]


def describe(network: Network) -> str:
    """The source with line numbers, for messages."""
    return '\n'.join(f'{number:3} {line}' for number, line in enumerate(network.source.splitlines(), 1))
