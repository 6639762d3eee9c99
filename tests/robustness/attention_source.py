"""Random attention modules in a small transformer, as the Python source of their classes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from textwrap import indent

from torch import nn

from tests.robustness.network_source import Network


@dataclass(frozen=True)
class AttentionNetwork:
    """One random transformer.

    Attributes:
        network: The network; its output is a dictionary with 'before', 'beside' and 'after' its attention.
        plain: Whether its attention is softmax(q kᵀ / sqrt(d)) v for some scale, and nothing else.
    """

    network: Network
    plain: bool

    def build(self) -> nn.Module:
        """The network with random weights."""
        return self.network.build()


_PREAMBLE = """
import math

import torch
from torch import nn
from torch.nn import functional as F

C, HEADS, WIDTH, TOKENS = {channels}, {heads}, {width}, {tokens}
""".strip()


@dataclass
class _Writer:
    """The parts of an attention module that is being written."""

    draw: random.Random
    init: list[str]
    body: list[str]
    plain: bool = True

    def one_of(self, *choices: str) -> str:
        return self.draw.choice(choices)


def random_attention(draw: random.Random) -> AttentionNetwork:
    """Draws a transformer of one or two blocks with a random attention module."""
    heads = draw.choice([1, 2, 2, 3])
    width = draw.choice([4, 8])
    prefix = draw.choice([0, 0, 1, 3])
    writer = _Writer(draw, [], [])
    mask = draw.choice(['', '', '', '', 'padding', 'pairs', 'none'])
    _write_inputs(writer, more_keys=not mask)
    _write_attention(writer, mask)
    returns = _write_output(writer)
    tokens = 16 + prefix
    source = _PREAMBLE.format(channels=heads * width, heads=heads, width=width, tokens=tokens)
    source += '\n\n\n' + _module_source(writer, mask) + '\n\n\n' + _net_source(draw, prefix, mask, returns) + '\n'
    return AttentionNetwork(Network(source, {}, (3, 16, 16)), writer.plain)


def _write_inputs(writer: _Writer, more_keys: bool) -> None:
    """Projections, and the split into heads: q, k and v of (B, heads, N, width)."""
    bias = writer.one_of('True', 'False')
    kind = writer.one_of('packed', 'packed', 'separate', 'keys and values', 'one head of keys')
    split = {
        'reshape': '{0}.reshape(B, N, {1}, WIDTH).transpose(1, 2)',
        'view': '{0}.view(B, -1, {1}, WIDTH).permute(0, 2, 1, 3)',
        'unflatten': '{0}.unflatten(-1, ({1}, -1)).transpose(1, 2)',
    }[writer.one_of('reshape', 'view', 'unflatten')]
    writer.body.append('B, N, _ = x.shape')
    if kind == 'packed':
        writer.init.append(f'self.qkv = nn.Linear(C, 3 * C, bias={bias})')
        writer.body += {
            'unbind': [
                'qkv = self.qkv(x).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)',
                'q, k, v = qkv.unbind(0)',
            ],
            'index': [
                'qkv = self.qkv(x).reshape(B, N, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)',
                'q, k, v = qkv[0], qkv[1], qkv[2]',
            ],
            'chunk': ['q, k, v = self.qkv(x).chunk(3, dim=-1)', *_split_each(split)],
            'split': ['q, k, v = torch.split(self.qkv(x), C, dim=2)', *_split_each(split)],
            'inside': [
                'qkv = self.qkv(x).view(B, N, HEADS, 3 * WIDTH).transpose(1, 2)',
                'q, k, v = qkv.split(WIDTH, dim=-1)',
            ],
            'slices': [
                'qkv = F.linear(x, self.qkv.weight, self.qkv.bias)',
                'q, k, v = qkv[..., :C], qkv[..., C:2 * C], qkv[..., 2 * C:]',
                *_split_each(split),
            ],
        }[writer.one_of('unbind', 'index', 'chunk', 'split', 'inside', 'slices')]
    elif kind == 'separate':
        writer.init += [f'self.{name} = nn.Linear(C, C, bias={bias})' for name in 'qkv']
        writer.body += [f'{name} = {split.format(f"self.{name}(x)", "HEADS")}' for name in 'qkv']
    elif kind == 'keys and values':
        writer.init += [f'self.q = nn.Linear(C, C, bias={bias})', 'self.kv = nn.Linear(C, 2 * C)']
        writer.body += [
            f'q = {split.format("self.q(x)", "HEADS")}',
            'k, v = self.kv(x).reshape(B, N, 2, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)',
        ]
    else:
        writer.init += ['self.q = nn.Linear(C, C)', *(f'self.{name} = nn.Linear(C, WIDTH)' for name in 'kv')]
        writer.body += [f'q = {split.format("self.q(x)", "HEADS")}']
        writer.body += [f'{name} = {split.format(f"self.{name}(x)", "1")}' for name in 'kv']
        writer.body += [f'{name} = {name}.expand(-1, HEADS, -1, -1)' for name in 'kv']
    if writer.draw.random() < 0.2:
        writer.init += ['self.q_norm = nn.LayerNorm(WIDTH)', 'self.k_norm = nn.LayerNorm(WIDTH)']
        writer.body.append('q, k = self.q_norm(q), self.k_norm(k)')
    if more_keys and writer.draw.random() < 0.15:  # tokens that only keys and values see
        writer.init.append('self.extra = nn.Parameter(torch.randn(2, 1, HEADS, 3, WIDTH))')
        writer.body += [
            f'{name} = torch.cat([self.extra[{index}].expand(B, -1, -1, -1), {name}], dim=2)'
            for index, name in enumerate('kv')
        ]


def _split_each(split: str) -> list[str]:
    return [f'{name} = {split.format(name, "HEADS")}' for name in 'qkv']


def _write_attention(writer: _Writer, mask: str) -> None:
    scale = writer.one_of('WIDTH ** -0.5', '1 / math.sqrt(WIDTH)', '0.3', 'k.shape[-1] ** -0.5')
    if writer.draw.random() < 0.4:
        _write_call(writer, mask)
        return
    products = ['q @ k.transpose(-2, -1)', 'torch.matmul(q, k.mT)', 'q.matmul(k.transpose(2, 3))'] * 4
    products.append("torch.einsum('bhnd,bhmd->bhnm', q, k)")
    place = writer.one_of('q', 'k', 'logits', 'logits', 'divide', 'none', 'learned')
    product = writer.one_of(*products)
    if place in 'qk':
        writer.body.append(f'{place} = {place} * {scale}')
    writer.body.append(f'attn = {product}')
    if place == 'logits':
        writer.body.append(writer.one_of(f'attn = attn * {scale}', f'attn *= {scale}', f'attn = attn.mul({scale})'))
    elif place == 'divide':
        writer.body.append(writer.one_of('attn = attn / WIDTH ** 0.5', 'attn = attn.div(math.sqrt(WIDTH))'))
    elif place == 'learned':
        writer.init.append('self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)')
        writer.body.append('attn = attn * self.temperature')
    _write_bias(writer)
    if mask == 'padding':
        writer.body.append(writer.one_of('attn = attn.masked_fill(~mask, float("-inf"))', 'attn = attn + mask.log()'))
    elif mask == 'pairs':
        writer.body.append('attn = attn.masked_fill(mask == 0, -10000.0)')
    elif mask == 'none':
        writer.body += ['if mask is not None:', '    attn = attn + mask']
    writer.body.append(
        writer.one_of(
            'attn = attn.softmax(dim=-1)',
            'attn = F.softmax(attn, dim=-1)',
            'attn = torch.softmax(attn.float(), -1).to(v.dtype)',
            'attn = self.softmax(attn)',
            'attn = (attn - attn.amax(-1, keepdim=True)).softmax(-1)',
        )
    )
    writer.init.append('self.softmax = nn.Softmax(dim=-1)')
    rare = writer.draw.random()
    if rare < 0.3:
        writer.init.append('self.drop = nn.Dropout(0.1)')
        writer.body.append('attn = self.drop(attn)')
    elif rare < 0.4:
        writer.init.append('self.mix = nn.Conv2d(HEADS, HEADS, 1)')
        writer.body.append('attn = self.mix(attn)')
        writer.plain = False
    elif rare < 0.45:
        writer.body.append('attn = attn * attn')
        writer.plain = False
    products = ['x = attn @ v', 'x = torch.matmul(attn, v)'] * 5
    writer.body.append(writer.one_of(*products, "x = torch.einsum('bhnm,bhmd->bhnd', attn, v)"))


def _write_call(writer: _Writer, mask: str) -> None:
    """One call of torch's own attention."""
    arguments = ['q', 'k', 'v']
    writer.init.append('self.rate = 0.1')
    if mask in ('padding', 'pairs', 'none'):
        arguments.append(writer.one_of('mask', 'attn_mask=mask'))
        if mask == 'pairs':
            arguments[-1] = 'attn_mask=mask'
    arguments += {
        'nothing': [],
        'dropout': ['dropout_p=self.rate if self.training else 0.0'],
        'scale': ['scale=0.3'],
        'causal': ['is_causal=True'],
    }[writer.one_of('nothing', 'dropout', 'dropout', 'scale', *(['causal'] if not mask else []))]
    writer.body.append(f'x = F.scaled_dot_product_attention({", ".join(arguments)})')


def _write_bias(writer: _Writer) -> None:
    kind = writer.draw.random()
    keys = 'k.shape[-2]'
    if kind < 0.12:
        writer.init.append('self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS + 3))')
        writer.body.append(f'attn = attn + self.bias[:, :, :N, :{keys}]')
        writer.plain = False
    elif kind < 0.2:
        writer.init += [
            'self.table = nn.Parameter(torch.randn(7, HEADS))',
            'self.register_buffer("index", torch.arange((TOKENS + 3) ** 2).view(TOKENS + 3, TOKENS + 3) % 7)',
        ]
        writer.body.append(f'attn = attn + self.table[self.index[:N, :{keys}]].permute(2, 0, 1)')
        writer.plain = False
    elif kind < 0.25:
        writer.body.append(f'attn = attn + torch.ones(N, {keys}, dtype=torch.bool, device=x.device).triu(1) * -1e4')
        writer.plain = False


def _write_output(writer: _Writer) -> str:
    writer.body.append(writer.one_of('x = x.transpose(1, 2).reshape(B, N, C)', 'x = x.transpose(1, 2).flatten(2)'))
    rare = writer.draw.random()
    if rare < 0.1:
        writer.init.append('self.gate = nn.Linear(C, C)')
        writer.body.insert(0, 'gate = self.gate(x).sigmoid()')
        writer.body.append('x = x * gate')
    elif rare < 0.2:
        writer.body.insert(0, 'shortcut = x')
        writer.body.append('x = x + shortcut')
    if writer.draw.random() < 0.8:
        writer.init += ['self.proj = nn.Linear(C, C)', 'self.proj_drop = nn.Dropout(0.1)']
        writer.body.append('x = self.proj_drop(self.proj(x))')
    returns = writer.one_of('x', 'x', 'x', 'x', 'x, q', 'x, v', 'x, None')
    if returns == 'x, attn' and not any('attn' in line for line in writer.body):
        returns = 'x'
    writer.body.append(f'return {returns}')
    return returns


def _module_source(writer: _Writer, mask: str) -> str:
    header = {'': 'self, x', 'padding': 'self, x, mask', 'pairs': 'self, x, *, mask', 'none': 'self, x, mask=None'}[
        mask
    ]
    init = list(dict.fromkeys(writer.init))
    lines = ['class Attention(nn.Module):', '    def __init__(self):', '        super().__init__()']
    lines += [f'        {line}' for line in init]
    return '\n'.join([*lines, '', f'    def forward({header}):', indent('\n'.join(writer.body), ' ' * 8)])


def _net_source(draw: random.Random, prefix: int, mask: str, returns: str) -> str:
    given = {'': 'y', 'padding': 'y, mask', 'pairs': 'y, mask=mask', 'none': 'y'}[mask]
    call = f'self.attention{{0}}({given})' + ('[0]' if ',' in returns else '')
    count = draw.choice([1, 1, 2])
    lines = ['class Net(nn.Module):', '    def __init__(self):', '        super().__init__()']
    init = [
        'self.patches = nn.Conv2d(3, C, 4, stride=4)',
        'self.beside = nn.Linear(C, C)',
        'self.head = nn.Linear(C, 5)',
    ]
    init += [f'self.tokens = nn.Parameter(torch.randn(1, {prefix}, C))'] if prefix else []
    init += [f'self.{name}{number} = {cls}' for number in range(count) for name, cls in _PARTS]
    body = ['x = self.patches(images).flatten(2).transpose(1, 2)']
    body += ['x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1)'] if prefix else []
    if mask == 'padding':
        body.append('mask = (torch.arange(x.shape[1], device=x.device) < x.shape[1] - 2).expand(x.shape[0], 1, 1, -1)')
    elif mask == 'pairs':
        body.append('mask = torch.ones(x.shape[1], x.shape[1], device=x.device).tril() > 0')
    body += ['before = x']
    for number in range(count):
        body += [f'y = self.norm{number}(x)', f'x = x + {call.format(number)}', f'x = x + self.mlp{number}(x)']
    body.append("return {'before': before, 'beside': self.beside(before), 'after': self.head(x.mean(1))}")
    lines += [f'        {line}' for line in init]
    return '\n'.join([*lines, '', '    def forward(self, images):', *(f'        {line}' for line in body)])


_PARTS = (
    ('norm', 'nn.LayerNorm(C)'),
    ('attention', 'Attention()'),
    ('mlp', 'nn.Sequential(nn.Linear(C, C), nn.GELU())'),
)
