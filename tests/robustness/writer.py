"""A random forward that is being written: its variables, its layers, and the ways to write a sum."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

CHANNELS = 6

LAYERS = {
    'NCHW': [
        'nn.Conv2d(C, C, 3, padding=1)',
        'nn.Conv2d(C, C, 1, bias=False)',
        'nn.Conv2d(C, C, 3, padding=1, groups=C)',
        'nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())',
        'nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.Conv2d(C, C, 3, padding=1))',
        'nn.Sequential(nn.Conv2d(C, 2 * C, 1), nn.GELU(), nn.Conv2d(2 * C, C, 1))',
        'Skip(nn.Conv2d(C, C, 1))',
    ],
    'NLC': [
        'nn.Linear(C, C)',
        'nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C))',
        'nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * C, C))',
        'Skip(nn.Linear(C, C))',
    ],
}
LAYERS['NHWC'] = LAYERS['NLC']
_LIGHT = {
    'NCHW': ['nn.BatchNorm2d(C)', 'nn.GroupNorm(2, C)', 'Scale(1, 1)', 'Scale(1, 1, inplace=True)'],
    'NLC': ['nn.LayerNorm(C)', 'Scale()', 'Scale(inplace=True)'],
}
_LIGHT['NHWC'] = _LIGHT['NLC']
_WEIGHTLESS = ['nn.ReLU()', 'nn.ReLU(inplace=True)', 'nn.Identity()', 'nn.Dropout(0.2)', 'DropPath(0.3)', 'nn.GELU()']
_WEIGHTLESS += ['nn.Dropout(0.3, inplace=True)', 'nn.Sequential()']


@dataclass
class Writer:
    """A forward that is being written.

    Attributes:
        draw: Where choices come from.
        layout: Layout of its tensors.
        live: Variables that hold a tensor of the common shape, the newest last.
        init: Statements of the constructor.
        body: Statements of the forward.
        methods: Further methods.
        values: Values that a caller may give to each further argument.
    """

    draw: random.Random
    layout: str
    first: str
    live: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.live.append(self.first)

    def new_name(self) -> str:
        self.count += 1
        return f'v{self.count}'

    def tensor(self) -> str:
        """A live variable, mostly one of the last."""
        return self.draw.choice([*self.live, *self.live[-2:], self.live[-1]])

    def child(self, code: str) -> str:
        """The attribute of a new child."""
        self.count += 1
        self.init.append(f'self.child{self.count} = {code}')
        return f'child{self.count}'

    def layer(self, *, weights: bool = False) -> str:
        """A new layer, with weights or of any kind; or one that is there already."""
        shared = [line.split()[0] for line in self.init if re.match(r'self.child\d+ = (?!Block|nn.ModuleList)', line)]
        if shared and self.draw.random() < 0.05:
            return self.draw.choice(shared)
        kinds = LAYERS[self.layout]
        if not weights:
            kinds = kinds + kinds + _LIGHT[self.layout] + _WEIGHTLESS
        return f'self.{self.child(self.draw.choice(kinds))}'

    def assign(self, expression: str) -> str:
        """Gives a value to a variable, new or old."""
        name = self.tensor() if self.draw.random() < 0.4 else self.new_name()
        self.body.append(f'{name} = {expression}')
        self.lives(name)
        return name

    def lives(self, name: str) -> None:
        if name in self.live:
            self.live.remove(name)
        self.live.append(name)

    def add(self) -> None:
        """A sum of two tensors, in one of the ways to write one."""
        first = self.live[-1]
        if len(self.live) == 1 or self.draw.random() < 0.2:
            first = self.new_name()
            self.body.append(f'{first} = {self.layer(weights=True)}({self.live[-1]})')
            self.live.append(first)
        second = self.draw.choice(self.live[:-1])
        if self.draw.random() < 0.5:
            first, second = second, first
        form = self.draw.choice(_SUMS * 3 + _OTHER_SUMS)
        if form.startswith('{a}'):  # a statement that changes its first operand
            self.body.append(form.format(a=first, b=second))
            self.lives(first)
        else:
            self.assign(form.removeprefix('=').format(a=first, b=second))


_SUMS = ['={a} + {b}', '={a} + {b}', '={a}.add({b})', '={a}.add_({b})', '=torch.add({a}, {b})', '{a} += {b}']
_OTHER_SUMS = [
    '{a}.add_({b})',
    '=torch.add(input={a}, other={b})',
    '=torch.add({a}, {b}, alpha=1)',
    '={a}.add(other={b})',
    '=operator.add({a}, {b})',
    '=operator.iadd({a}, {b})',
    '={a}.__add__({b})',
    '=plus({a}, {b})',
    '=plus(y={a}, x={b})',
    '=sum([{a}, {b}])',
    '=total([{a}, {b}])',
    '=functools.reduce(operator.add, [{a}, {b}])',
    '=torch.stack([{a}, {b}]).sum(0)',
    '={a} - (-{b})',
    '={a} + 0.5 * {b}',
    '=(lambda p, q: p + q)({a}, {b})',
    '=torch.cat([{a}[:, :2] + {b}[:, :2], {a}[:, 2:]], 1)',
    '{a}[:, :2] += {b}[:, :2]',
    '={a} + {b}.to({a}.dtype)',
    '=torch.add({a}, {b}, out=None)',
    '=({a} + {b}) + {a}',
    '=torch.lerp({a}, {b}, 0.5) * 2',
]
