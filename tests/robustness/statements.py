"""The statements that random forwards are made of; each keeps the shape of the tensors it works on."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import indent

from tests.robustness.writer import LAYERS, Writer


def write_statements(writer: Writer, number: int) -> None:
    """Appends some statements, the common kinds more often."""
    for _ in range(number):
        kinds = _COMMON if writer.draw.random() < 0.75 else _RARE
        writer.draw.choice(kinds)(writer)


def _layer(writer: Writer) -> None:
    writer.assign(f'{writer.layer()}({writer.tensor()})')


def _two_layers(writer: Writer) -> None:
    writer.assign(f'{writer.layer()}({writer.layer(weights=True)}({writer.tensor()}))')


def _add(writer: Writer) -> None:
    writer.add()


def _residual(writer: Writer) -> None:
    tensor = writer.tensor()
    writer.assign(f'{tensor} + {writer.layer()}({writer.layer(weights=True)}({tensor}))')


def _function(writer: Writer) -> None:
    forms = [
        'F.relu({x})',
        'torch.tanh({x})',
        'F.gelu({x})',
        '{x} * torch.sigmoid({x})',
        '{x}.clamp(-3, 3)',
        'F.dropout({x}, 0.2, self.training)',
        'F.dropout({x}, p=0.2, training=self.training)',
        '(lambda t: t * 0.7)({x})',
        'F.layer_norm({x}, {x}.shape[1:])',
        '{x} * 1.25 if self.training else {x}',
        '{x} * (0.5 if {x}.shape[0] > 1 else 1.0)',
        'torch.where({x} > 0, {x}, 0.1 * {x})',
        '{x} / ({x}.shape[-1] ** 0.5)',
        'F.pad({x}, (0, 1))[..., :-1].contiguous()',
    ]
    writer.assign(writer.draw.choice(forms).format(x=writer.tensor()))


def _alias(writer: Writer) -> None:
    forms = [
        '{x}',
        '{x}.view({x}.shape)',
        '{x}.view_as({x})',
        '{x}[:]',
        '{x}.clone()',
        '{x}.contiguous()',
        '{x}.transpose(1, 2).transpose(2, 1)',
        '{x}.transpose(1, -1).contiguous().transpose(1, -1)',
        '{x}.flatten(1).view({x}.shape)',
        '{x}.reshape({x}.shape[0], -1).reshape({x}.size())',
        '{x}.unsqueeze(0).squeeze(0)',
        '{x}.detach()',
        '{x}.double().to({x}.dtype)',
        '{x}.float()',
        '{x}.half().float()',
        '{x}.to({y}.dtype)',
        '{x}.type_as({y})',
        '{x}.flip(1)',
        'torch.cat({x}.chunk(2, 1), 1)',
        'torch.stack({x}.unbind(0))',
    ]
    form = writer.draw.choice(forms)
    writer.assign(form.format(x=writer.tensor(), y=writer.tensor()))


_COMMON: list[Callable[[Writer], None]] = [_layer, _layer, _two_layers, _add, _add, _residual, _residual, _function]
_COMMON += [_alias]


def _in_place(writer: Writer) -> None:
    forms = [
        '{x}.mul_(0.5)',
        '{x} *= 0.9',
        '{x} -= 0.1',
        '{x}.relu_()',
        'F.relu({x}, inplace=True)',
        '{x}[:, :1] += 1.0',
        '{x}[:1] = 0.0',
        '{x}.view(-1).mul_(0.5)',
        '{x}.transpose(1, 2).add_(0.25)',
        'torch.relu_({x})',
        '{x}.copy_({x} * 0.5)',
        '{x}.data.mul_(0.5)',
    ]
    tensor = writer.tensor()
    writer.body.append(writer.draw.choice(forms).format(x=tensor))
    writer.lives(tensor)


def _condition(writer: Writer) -> None:
    tensor = writer.tensor()
    conditions = [
        'self.training',
        'not self.training',
        'self.flag',
        'self.rate > 0.0',
        "self.kind == 'a'",
        f'{tensor}.shape[0] > 1',
        f'{tensor}.size(0) == 2',
        f'{tensor}.ndim == 4',
        f'{tensor}.dim() > 2',
        f'{tensor}.shape[-1] % 2',
        f'{tensor}.dtype == torch.float32',
        f'{tensor}.is_floating_point()',
        f'{tensor}.requires_grad',
        f'not {tensor}.requires_grad',
        f'{tensor}.is_contiguous()',
        f'isinstance({tensor}, torch.Tensor)',
        f'isinstance({tensor}, (tuple, list))',
        f'torch.is_tensor({tensor})',
        f'hasattr({tensor}, "decomposed")',
        f'{tensor} is None',
        'torch.is_grad_enabled()',
        'torch.jit.is_scripting()',
        'any(p.requires_grad for p in self.parameters())',
        'len(list(self.children())) > 2',
        'self.training and self.flag',
        f'{tensor}.grad_fn is None',
    ]
    condition = writer.draw.choice(conditions)
    writer.init += ['self.flag = True', 'self.rate = 0.1', "self.kind = 'a'"]
    result = writer.new_name()
    branches = []
    for _ in range(2):
        sub = Writer(writer.draw, writer.layout, tensor, list(writer.live), writer.init, [], writer.methods)
        sub.count = writer.count
        write_statements(sub, 1)
        sub.body.append(f'{result} = {sub.live[-1]}')
        writer.count = sub.count
        branches.append(indent('\n'.join(sub.body), '    '))
    form = writer.draw.choice(['else', 'else', 'default', 'return'])
    if form == 'else':
        writer.body += [f'if {condition}:', branches[0], 'else:', branches[1]]
    elif form == 'default':
        writer.body += [f'{result} = {tensor}', f'if {condition}:', branches[0]]
    else:
        writer.body += [f'if {condition} and self.early:', '    RETURN', f'{result} = {tensor}']
        writer.init.append(f'self.early = {writer.draw.choice(["False", "False", "True"])}')
    writer.lives(result)


def _loop(writer: Writer) -> None:
    layers = ', '.join(writer.draw.choice(LAYERS[writer.layout]) for _ in range(writer.draw.randint(1, 3)))
    kind = writer.draw.choice(['nn.ModuleList', 'nn.ModuleList', 'nn.Sequential'])
    child = f'self.{writer.child(f"{kind}([{layers}])" if kind == "nn.ModuleList" else f"{kind}({layers})")}'
    tensor, result = writer.tensor(), writer.new_name()
    forms = [
        ['{y} = {x}', 'for layer in {c}:', '    {y} = {y} + layer({y})'],
        ['{y} = {x}', 'for layer in {c}:', '    {y} = layer({y})', '{y} = {x} + {y}'],
        ['parts = [{x}]', 'for layer in {c}:', '    parts.append(layer(parts[-1]))', '{y} = sum(parts)'],
        ['parts = [{x}, *(layer({x}) for layer in {c})]', '{y} = functools.reduce(operator.add, parts)'],
        ['{y} = {x} + sum(layer({x}) for layer in {c})'],
        ['{y} = {x} + torch.stack([layer({x}) for layer in {c}]).sum(0)'],
        ['{y} = {x}.clone()', 'for number in range(len({c})):', '    {y} += {c}[number]({x})'],
        ['{y}, number = {x}, 0', 'while number < len({c}):', '    {y}, number = {y} + {c}[number]({y}), number + 1'],
    ]
    writer.body += [line.format(x=tensor, y=result, c=child) for line in writer.draw.choice(forms)]
    writer.lives(result)


def _region(writer: Writer) -> None:
    layer, tensor, result = writer.layer(weights=True), writer.tensor(), writer.new_name()
    forms = [
        ['with torch.no_grad():', '    {y} = {l}({x})'],
        ['with torch.no_grad():', '    {y} = torch.add({x}, {l}({x}), out=torch.empty_like({x}))'],
        ['with torch.set_grad_enabled(self.training):', '    {y} = {x} + {l}({x})'],
        ['with torch.autocast("cpu", dtype=torch.bfloat16):', '    {y} = {l}({x})', '{y} = {y}.float()'],
        ['{y} = checkpoint({l}, {x}, use_reentrant=False)'],
        ['{y} = {x} + checkpoint({l}, {x}, use_reentrant=False)'],
        ['{y} = {x} + checkpoint(lambda t: {l}(t) + t, {x}, use_reentrant=False)'],
        ['try:', '    {y} = {x} + {l}({x})', 'except ValueError:', '    {y} = {x}'],
        ['assert {x}.shape[1] > 0', '{y} = {l}({x})'],
        ['{y} = {x} + (z := {l}({x})) * z'],
    ]
    writer.body += [line.format(x=tensor, y=result, l=layer) for line in writer.draw.choice(forms)]
    writer.lives(result)


def _random_numbers(writer: Writer) -> None:
    forms = [
        '{x} * (torch.rand({x}.shape[0], *[1] * ({x}.ndim - 1)) > 0.3) if self.training else {x}',
        '{x} + 0.1 * torch.randn_like({x}) if self.training else {x}',
        '{x} * torch.rand_like({x}[:, :1])',
        '{x} * {x}.new_empty({x}.shape[0], *[1] * ({x}.ndim - 1)).bernoulli_(0.8)',
        '{x} * random.random()',
        '{x} * numpy.random.rand()',
        '{x} * 2.0 if self.training and random.random() < 0.5 else {x}',
        '{x} * 2.0 if self.training and numpy.random.rand() < 0.5 else {x}',
        '{x} * torch.rand(()).item()',
    ]
    writer.assign(writer.draw.choice(forms).format(x=writer.tensor()))


def _side_effect(writer: Writer) -> None:
    forms = [
        (['self.calls = 0'], ['self.calls += 1']),
        (['self.calls = 0'], ['self.calls = self.calls + 1', '{y} = {x} * self.calls']),
        # A copy: a change in place of a tensor that a child keeps as well does not reach the child after a patch.
        (['self.last = None'], ['self.last = {x}.detach().clone()']),
        (['self.log = []'], ['self.log.append(1)']),
        (['self.log = []'], ['self.log.append(1)', '{y} = {x} * len(self.log)']),
        (['self.seen = {}'], ['self.seen["x"] = 1']),
        (['self.seen = {}'], ['self.seen["n"] = self.seen.get("n", 0) + 1', '{y} = {x} * self.seen["n"]']),
        (['self.seen = set()'], ['self.seen.add(3)']),
        (
            ['self.register_buffer("mean", torch.zeros(()))'],
            ['if self.training:', '    self.mean.mul_(0.9).add_({x}.detach().mean().float(), alpha=0.1)'],
        ),
        (['self.register_buffer("steps", torch.zeros((), dtype=torch.long))'], ['self.steps += 1']),
        (['self.register_buffer("steps", torch.zeros(()))'], ['self.steps = self.steps + 1']),
        (['self.register_buffer("steps", torch.zeros(()))'], ['self.steps.add_(1)', '{y} = {x} + self.steps']),
    ]
    init, body = writer.draw.choice(forms)
    result = writer.new_name()
    tensor = writer.tensor()
    writer.init += init
    writer.body += [line.format(x=tensor, y=result) for line in body]
    if any('{y}' in line for line in body):
        writer.lives(result)


def _method(writer: Writer) -> None:
    writer.count += 1
    name = f'part{writer.count}'
    sub = Writer(writer.draw, writer.layout, 't', [], writer.init, [], writer.methods)
    sub.count = writer.count
    write_statements(sub, writer.draw.randint(1, 2))
    writer.count = sub.count
    body = [*(line.replace('RETURN', 'return t') for line in sub.body), f'return {sub.live[-1]}']
    writer.methods.append('\n'.join([f'def {name}(self, t):', *(indent(line, '    ') for line in body)]))
    tensor = writer.tensor()
    forms = ['{x} + self.{m}({x})', 'self.{m}({x})', 'self.{m}({x}) + {x}', '{x} + self.{m}(t={x})']
    writer.assign(writer.draw.choice(forms).format(x=tensor, m=name))


def _parameter(writer: Writer) -> None:
    shape = 'C, 1, 1' if writer.layout == 'NCHW' else 'C'
    writer.count += 1
    name = f'weight{writer.count}'
    writer.init.append(f'self.{name} = nn.Parameter(torch.rand({shape}))')
    forms = [
        '{x} * self.{w}',
        '{x} + self.{w}',
        '{x} + self.{w} * {l}({x})',
        '{x} + {l}({x}) * self.{w}',
        'torch.addcmul({x}, {l}({x}), self.{w})',
        '{x} + getattr(self, "{w}") * {l}({x})',
    ]
    form = writer.draw.choice(forms)
    layer = writer.layer(weights=True) if '{l}' in form else ''
    writer.assign(form.format(x=writer.tensor(), w=name, l=layer))


_RARE: list[Callable[[Writer], None]] = [_in_place, _condition, _condition, _loop, _region, _random_numbers]
_RARE += [_side_effect, _method, _parameter]
