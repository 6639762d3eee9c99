"""SEM and the single systems: identity, formula, forms, layouts, types."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import timm
import torch
from torch import Tensor, nn

from sem_timm.errors import OptionError
from sem_timm.layers import SEM, ChannelGate, Excitation
from tests.lively import lively
from tests.thorough import thorough
from tests.versions import compiles_once_more, free_batch, without_compiled_files

Gate = TypeVar('Gate', bound=ChannelGate)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
GATES: dict[str, Any] = {
    'sem': SEM,
    'se': Excitation,
    'eca': lambda channels, **options: Excitation(channels, 'eca', **options),
}
# (shape, channel_dim, num_prefix_tokens), with 16 channels
LAYOUTS = [
    ((2, 16, 5), 1, 0),
    ((2, 16, 5, 7), 1, 0),
    ((2, 16, 3, 5, 7), 1, 0),
    ((2, 5, 16), -1, 0),
    ((2, 5, 16), -1, 2),
    ((2, 5, 7, 16), -1, 0),
    ((2, 3, 5, 7, 16), -1, 0),
    ((2, 16, 16, 16), 1, 0),
    ((2, 16, 16, 16), -1, 0),
]


def trained(gate: Gate) -> Gate:
    """The gate with all parameters away from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return gate


def published_gate(sem: SEM, pooled: Tensor) -> Tensor:
    """The paper's equations, written out."""
    p = {name: parameter.detach() for name, parameter in sem.named_parameters()}
    w = 1 / (1 + torch.exp(-(pooled @ p['decision.weight'].T + p['decision.bias'])))
    hidden = (pooled @ p['operators.se.fc1.weight'].T + p['operators.se.fc1.bias']).clamp(min=0)
    e1 = hidden @ p['operators.se.fc2.weight'].T + p['operators.se.fc2.bias']
    kernel = p['operators.eca.conv.weight'].flatten()
    reach = len(kernel) // 2
    e2 = torch.zeros_like(pooled)
    for channel in range(pooled.shape[1]):
        for tap, weight in enumerate(kernel):
            if 0 <= channel + tap - reach < pooled.shape[1]:
                e2[:, channel] += weight * pooled[:, channel + tap - reach]
    e3 = p['operators.ie.gamma'] * pooled + p['operators.ie.beta']
    gate = torch.ones_like(pooled)
    for index, logits in enumerate((e1, e2, e3)):
        gate = gate / (1 + torch.exp(-w[:, index, None] * logits))
    return gate


@pytest.mark.parametrize('channels', [16, 128])
def test_gate_follows_the_published_equations(channels: int) -> None:
    sem = trained(SEM(channels, init='paper', dtype=torch.float64))
    x = torch.randn(3, channels, 4, 5, dtype=torch.float64)
    expected = published_gate(sem, x.mean((2, 3)))
    torch.testing.assert_close(sem.gate(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sem(x), x * expected[:, :, None, None], rtol=1e-10, atol=1e-12)


def test_paper_init_scales_by_the_published_mean() -> None:
    torch.manual_seed(0)
    gate = SEM(256, init='paper').gate(torch.randn(16, 256, 8, 8))
    assert gate.mean().item() == pytest.approx(0.094, abs=0.002)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('name', GATES)
def test_identity_init_is_exact_bit_for_bit(name: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    gate = GATES[name](64, dtype=dtype)
    x, shortcut = (torch.randn(3, 64, 9, 7, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(2))
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, 1e-7])
    out, added = gate(x), gate(x, shortcut)
    assert torch.equal(out, x) and torch.equal(torch.signbit(out), torch.signbit(x))
    assert torch.equal(added, shortcut + x)
    for result in (out, added):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize(('shape', 'channel_dim', 'prefix'), LAYOUTS)
def test_identity_and_gate_in_every_layout(name: str, shape: tuple[int, ...], channel_dim: int, prefix: int) -> None:
    x, shortcut = torch.randn(shape), torch.randn(shape)
    gate = GATES[name](16, channel_dim=channel_dim, num_prefix_tokens=prefix)
    assert torch.equal(gate(x), x)
    assert torch.equal(gate(x, shortcut), shortcut + x)
    trained(gate)
    reference = GATES[name](16)
    reference.load_state_dict(gate.state_dict())
    moved = x.movedim(channel_dim, 1)
    flat = moved.reshape(2, 16, -1)
    expected = reference.gate(flat[:, :, prefix:])
    assert torch.allclose(gate.gate(x), expected, rtol=1e-4, atol=1e-6)
    scaled = (flat * expected.unsqueeze(-1)).reshape(moved.shape).movedim(1, channel_dim)
    torch.testing.assert_close(gate(x), scaled, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gate(x, shortcut), shortcut + scaled, rtol=1e-4, atol=1e-5)


def test_prefix_tokens_are_gated_but_not_pooled() -> None:
    sem = trained(SEM(16, channel_dim=-1, num_prefix_tokens=1))
    x = torch.randn(2, 10, 16)
    other = x.clone()
    other[:, 0] += 100
    assert torch.equal(sem.gate(x), sem.gate(other))
    assert not torch.equal(sem(x)[:, 0], x[:, 0])


@pytest.mark.parametrize('dtype', DTYPES)
def test_identity_init_learns_in_every_last_weight_at_the_first_step(dtype: torch.dtype) -> None:
    sem = SEM(32, operators=('se', 'eca', 'ie', 'ceca', 'ese', 'lct', 'se'), dtype=dtype)
    last = {name: p for name, p in sem.named_parameters() if name.startswith('operators') and not p.any()}
    assert len(last) == 12
    x, shortcut = (torch.randn(4, 32, 5, 5, dtype=dtype) + 1 for _ in range(2))
    sem(x, shortcut).float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in last.values())


def test_gradients_are_the_numerical_ones() -> None:
    sem = trained(SEM(8, dtype=torch.float64))
    x, shortcut = (torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(sem, (x, shortcut))


def test_shortcut_of_a_larger_batch() -> None:
    x, shortcut = torch.randn(1, 8, 3, 2), torch.randn(4, 8, 3, 2)
    assert torch.equal(SEM(8)(x, shortcut), x + shortcut)
    with torch.no_grad():
        assert torch.equal(SEM(8)(x, shortcut), x + shortcut)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('operators', [('se',), ('se', 'eca', 'ie'), ('se', 'se', 'lct', 'ceca')])
def test_forms_convert_exactly_by_a_power_of_two(operators: tuple[str, ...], dtype: torch.dtype) -> None:
    paper = trained(SEM(32, operators=operators, init='paper', dtype=dtype))
    identity = SEM(32, operators=operators, dtype=dtype)
    factor = 2.0 ** len(operators)
    assert (paper.gain, identity.gain) == (1.0, factor)
    x = torch.randn(3, 32, 6, 6, dtype=dtype)
    identity.load_state_dict(paper.state_dict())
    assert identity.form == 'paper' and torch.equal(identity(x), paper(x))
    identity.set_form('identity')
    assert torch.equal(identity.gate(x), factor * paper.gate(x))
    # The factor, carried by the caller, restores the function.
    torch.testing.assert_close(identity(x) / factor, paper(x), rtol=1e-3, atol=1e-6)
    assert identity.set_form('paper') is identity and identity.form == 'paper'
    assert torch.equal(identity(x), paper(x))
    assert torch.equal(identity.set_form('identity').gate(x), factor * paper.gate(x))


def test_a_gain_of_neither_form_is_refused() -> None:
    state = SEM(16).state_dict()
    with pytest.raises(OptionError, match=r'operators se, eca, ie it is 1 or 8\.0'):
        SEM(16).load_state_dict({**state, 'gain': torch.tensor(3.0)})


def test_reset_parameters_gives_either_init() -> None:
    x = torch.randn(2, 16, 4, 4)
    sem = trained(SEM(16))
    sem.reset_parameters()
    assert torch.equal(sem(x), x)
    sem.reset_parameters('paper')
    assert sem.form == 'paper' and sem.operators['se'].fc2.weight.any()
    sem.reset_parameters()
    assert sem.form == 'paper' and torch.equal(sem.operators['ie'].beta, -torch.ones(16))


@pytest.mark.parametrize('init', ['papier', 'identity'])
def test_reset_parameters_that_is_refused_leaves_them_as_they_were(init: Any) -> None:
    class Plain(nn.Module):
        def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__()
            self.fc = nn.Linear(channels, channels, device=device, dtype=dtype)

        def forward(self, pooled: Tensor) -> Tensor:
            return self.fc(pooled)

    sem = SEM(16, operators=('se', Plain), init='paper')
    before = {name: tensor.clone() for name, tensor in sem.state_dict().items()}
    with pytest.raises(OptionError, match=init):
        sem.reset_parameters(init)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sem.state_dict().items())


@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
def test_vmap_over_weights_and_over_shortcuts(mode: Callable[[], Any]) -> None:
    sem = SEM(16, init='paper')
    x, shortcuts = torch.randn(2, 16, 5, 5), torch.randn(3, 2, 16, 5, 5)
    weights = torch.randn(3, *sem.decision.weight.shape)

    def gated(weight: Tensor, shortcut: Tensor) -> Tensor:
        return torch.func.functional_call(sem, {'decision.weight': weight}, (x, shortcut))

    with mode():
        for over in ((0, None), (None, 0)):
            given = [both if dim == 0 else both[0] for both, dim in zip((weights, shortcuts), over)]
            found = torch.func.vmap(gated, in_dims=over)(*given)
            one_by_one = [gated(*(g[i] if dim == 0 else g for g, dim in zip(given, over))) for i in range(3)]
            torch.testing.assert_close(found, torch.stack(one_by_one))


def test_decision_weighs_the_operators() -> None:
    sem = trained(SEM(16))
    x = torch.randn(3, 16, 4, 4)
    decision = sem.decide(x)
    assert decision.shape == (3, 3) and (decision > 0).all() and (decision < 1).all()
    with torch.no_grad():
        sem.decision.weight.zero_()
        sem.decision.bias.fill_(-1e4)
    # An operator that is decided away leaves the constant factor 2 sigmoid(0) = 1.
    assert torch.equal(sem(x), x)


def test_softmax_decision_shares_a_sum_of_one() -> None:
    sem = trained(SEM(16, init='paper', decision='softmax', dtype=torch.float64))
    pooled = torch.randn(3, 16, dtype=torch.float64)
    x = pooled[:, :, None].expand(-1, -1, 4)
    weights = torch.exp(pooled @ sem.decision.weight.T + sem.decision.bias)
    weights = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(sem.decide(x), weights, rtol=1e-10, atol=1e-12)
    gate = torch.ones_like(pooled)
    for index, operator in enumerate(sem.operators.values()):
        gate = gate / (1 + torch.exp(-weights[:, index, None] * operator(pooled)))
    torch.testing.assert_close(sem.gate(x), gate, rtol=1e-10, atol=1e-12)


def test_equal_decision_has_no_parameters_and_counts_every_operator_once() -> None:
    sem = trained(SEM(16, init='paper', decision='equal'))
    x = torch.randn(3, 16, 4, 4)
    assert sem.decision is None and not any(name.startswith('decision') for name in sem.state_dict())
    assert torch.equal(sem.decide(x), torch.ones(3, 3))
    single = [Excitation(16, name, init='paper') for name in sem.operators]
    for name, one in zip(sem.operators, single):
        one.operators[name].load_state_dict(sem.operators[name].state_dict())
    expected = torch.stack([one.gate(x) for one in single]).prod(0)
    torch.testing.assert_close(sem.gate(x), expected)
    sem.reset_parameters('identity')
    assert torch.equal(sem(x), x)


@pytest.mark.parametrize('decision', ['softmax', 'equal'])
def test_every_decision_starts_as_an_identity_and_gives_the_same_with_and_without_gradients(decision: Any) -> None:
    sem = SEM(32, decision=decision)
    x, shortcut = torch.randn(4, 32, 5, 5) + 1, torch.randn(4, 32, 5, 5)
    assert torch.equal(sem(x), x) and torch.equal(sem(x, shortcut), shortcut + x)
    last = {name: p for name, p in sem.named_parameters() if name.startswith('operators') and not p.any()}
    sem(x, shortcut).pow(2).sum().backward()
    assert last and all(p.grad is not None and p.grad.any() for p in last.values())
    trained(sem)
    with torch.no_grad():
        alone = sem(x, shortcut)
    torch.testing.assert_close(sem(x, shortcut), alone)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert sem(x.bfloat16()).dtype == torch.bfloat16
    assert sem.extra_repr().endswith(f'decision={decision!r}')


def test_state_dict_names_are_readable() -> None:
    assert set(SEM(16, operators=('se', 'eca', 'ie', 'eca')).state_dict()) == {
        'operators.se.fc1.weight', 'operators.se.fc1.bias', 'operators.se.fc2.weight', 'operators.se.fc2.bias',
        'operators.eca.conv.weight', 'operators.eca_2.conv.weight', 'operators.ie.gamma', 'operators.ie.beta',
        'decision.weight', 'decision.bias', 'gain',
    }  # fmt: skip


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('branch', [torch.float32, None])
@pytest.mark.parametrize('shortcut', [torch.float32, None])
def test_autocast_keeps_the_type_and_the_identity(
    dtype: torch.dtype, branch: torch.dtype | None, shortcut: torch.dtype | None
) -> None:
    sem = SEM(32, operators=('se', 'eca', 'ie', 'ceca', 'ese', 'lct'))
    x = torch.randn(2, 32, 6, 6, dtype=branch or dtype)
    other = torch.randn(2, 32, 6, 6, dtype=shortcut or dtype)
    with torch.autocast('cpu', dtype=dtype):
        assert sem(x).dtype == x.dtype and torch.equal(sem(x), x)
        assert torch.equal(sem(x, other), other + x)
        trained(sem)(x, other).sum().backward()
    assert all(parameter.grad is not None for parameter in sem.parameters())


def test_half_precision_pooling_does_not_overflow() -> None:
    x = torch.full((1, 8, 64, 64), 100.0, dtype=torch.float16)  # a sum of 409,600, above float16's 65,504
    assert torch.isfinite(trained(SEM(8, dtype=torch.float16)).gate(x)).all()


def test_compiles_whole_and_exports_with_a_free_batch() -> None:
    sem = trained(SEM(16)).eval()
    x, shortcut = torch.randn(3, 16, 6, 6), torch.randn(3, 16, 6, 6)
    expected = sem(x, shortcut)
    compiled = torch.compile(sem, fullgraph=True, backend='aot_eager', dynamic=True)
    torch.testing.assert_close(compiled(x, shortcut), expected)
    batch = free_batch()
    program = torch.export.export(sem, (x, shortcut), dynamic_shapes=({0: batch}, {0: batch})).module()
    torch.testing.assert_close(program(x, shortcut), expected)
    torch.testing.assert_close(program(x[:2], shortcut[:2]), sem(x[:2], shortcut[:2]))


@thorough
@pytest.mark.filterwarnings('ignore:TF32 acceleration:UserWarning')  # of any change of oneDNN's flags
@pytest.mark.filterwarnings('ignore:dynamo_pgo force disabled:UserWarning')  # of caches turned off
def test_one_compiled_training_step_serves_all_batches() -> None:
    sem = trained(SEM(16))
    compiled = torch.compile(sem, fullgraph=True)
    torch.compiler.reset()
    # With oneDNN, layouts are chosen that let everything pass; and what was compiled before may be on disk.
    with torch.backends.mkldnn.flags(enabled=False), without_compiled_files():
        for number, batch_size in enumerate((5, 6)):
            x = torch.randn(batch_size, 16, 6, 6, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 0)
            with compiles_once_more(number == 0):
                out = compiled(x)
            inputs = [x, *sem.parameters()]
            found, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, sem(x)))
            torch.testing.assert_close(out, sem(x))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fused operations round differently


def test_copies_pickles_and_meta_work() -> None:
    sem = trained(SEM(16, num_prefix_tokens=1, channel_dim=-1)).set_form('paper')
    x = torch.randn(2, 5, 16)
    for clone in (copy.deepcopy(sem), pickle.loads(pickle.dumps(sem))):
        assert torch.equal(clone(x), sem(x)) and clone.form == 'paper'
    assert SEM(16, device='meta')(torch.empty(2, 16, 4, 4, device='meta')).shape == (2, 16, 4, 4)
    assert "16, form='paper', channel_dim=-1, num_prefix_tokens=1" in repr(sem)


@pytest.mark.parametrize('layer', [SEM, Excitation])
def test_timm_builds_it_as_attn_layer(layer: type[ChannelGate]) -> None:
    model = timm.create_model('resnet50', block_args=dict(attn_layer=layer), num_classes=3).eval()
    assert sum(isinstance(module, layer) for module in model.modules()) == 16
    plain = lively(timm.create_model('resnet50', num_classes=3)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
        for gate in [module for module in model.modules() if isinstance(module, layer)]:
            trained(gate)
        assert not torch.equal(model(x), plain(x))


@pytest.mark.parametrize(('options', 'message'), [
    (dict(channels=0), 'channels=0'),
    (dict(channels=2.5), 'channels=2.5'),
    (dict(reduction=0), 'reduction=0'),
    (dict(operators=()), r'operators is empty.*se, eca, ie'),
    (dict(operators='se'), r"operators=\('se', 'eca', 'ie'\)"),
    (dict(operators=('se', 'ecaa')), r"operator 'ecaa' is unknown\. Close: .*eca"),
    (dict(init='papr'), r"init='papr' is unknown\. Close: paper"),
    (dict(decision='soft'), r"decision='soft' is unknown\. Close: softmax"),
    (dict(channel_dim=2), 'channel_dim=2.*-1 for'),
    (dict(num_prefix_tokens=-1), 'num_prefix_tokens=-1'),
    (dict(num_prefix_tokens=1), 'channel_dim=1.*add channel_dim=-1'),
])  # fmt: skip
def test_bad_options_are_refused_with_the_way_out(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SEM(**{'channels': 16, **options})  # type: ignore[arg-type]


def test_excitation_refuses_several_operators_and_unknown_forms() -> None:
    with pytest.raises(OptionError, match='SEM takes several'):
        Excitation(16, ('se', 'eca'))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="form='both'"):
        Excitation(16).set_form('both')  # type: ignore[arg-type]


@pytest.mark.parametrize(('gate', 'shape'), [
    (SEM(16), (2, 16)),
    (SEM(16, channel_dim=-1, num_prefix_tokens=2), (2, 2, 16)),
    (SEM(16, channel_dim=-1, num_prefix_tokens=2), (2, 4, 4, 16)),
])  # fmt: skip
def test_inputs_without_positions_are_refused(gate: SEM, shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match='got an input of shape'):
        gate(torch.randn(shape))


@pytest.mark.parametrize('init', ['identity', 'paper'])
@pytest.mark.parametrize('operators', [('se',), ('se', 'eca', 'ie')])
def test_gate_is_the_product_of_what_the_operators_contribute(init: Any, operators: tuple[str, ...]) -> None:
    sem = SEM(12, operators=operators, init=init)
    for parameter in sem.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 12, 4, 3)
    gates = sem.operator_gates(x)
    assert gates.shape == (5, len(operators), 12)
    torch.testing.assert_close(gates.prod(1), sem.gate(x))
    assert gates.max() < (1 if init == 'paper' else 2)
