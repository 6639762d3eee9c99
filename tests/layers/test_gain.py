"""The gain of a gate: a buffer as any other, in whatever way weights travel; and what version 0.1.0 called it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn

from sem_timm.errors import OptionError
from sem_timm.layers import SEM, ChannelGate, Excitation

X = torch.randn(2, 16, 4, 4)


def stirred(gate: ChannelGate) -> ChannelGate:
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return gate


def both_forms() -> tuple[ChannelGate, ChannelGate]:
    """Two gates that differ in their form alone."""
    paper = stirred(SEM(16, init='paper'))
    return paper, copy.deepcopy(paper).set_form('identity')


def of_version_0_1_0(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f'{key.removesuffix("gain")}_extra_state' if key.split('.')[-1] == 'gain' else key: tensor
        for key, tensor in state.items()
    }


def test_parameters_and_buffers_are_all_there_is_to_a_gate() -> None:
    paper, identity = both_forms()
    assert not torch.equal(paper(X), identity(X))
    tensors = {**dict(paper.named_parameters()), **dict(paper.named_buffers())}
    assert torch.equal(torch.func.functional_call(identity, tensors, (X,)), paper(X))
    with torch.no_grad():
        for name, tensor in tensors.items():
            identity.get_buffer(name).copy_(tensor) if name == 'gain' else identity.get_parameter(name).copy_(tensor)
    assert torch.equal(identity(X), paper(X)) and identity.form == 'paper'


def test_an_ensemble_of_both_forms_runs_in_one_call() -> None:
    gates = both_forms()
    parameters, buffers = torch.func.stack_module_state(list(gates))

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(gates[0], (parameters, buffers), (x,))

    found = torch.func.vmap(run, in_dims=(0, 0, None))(parameters, buffers, X)
    torch.testing.assert_close(found, torch.stack([gate(X) for gate in gates]))


@pytest.mark.parametrize(('dtype', 'cast'), [
    (torch.float64, True), (torch.float32, True), (torch.bfloat16, True), (torch.float16, True),
    (torch.float32, False), (torch.bfloat16, False),
])  # fmt: skip
def test_no_type_sees_that_the_gain_is_a_tensor(dtype: torch.dtype, cast: bool) -> None:
    """Against the product with a plain number."""
    for gate in both_forms():
        number = float(gate.gain)
        gate, x = gate.to(dtype) if cast else gate, X.to(dtype)
        with torch.autocast('cpu', enabled=not cast, dtype=torch.bfloat16):
            expected = x * (gate._gate_pooled(gate.pool(x)).to(x.dtype).view(2, 16, 1, 1) * number)
            assert torch.equal(gate(x), expected) and gate(x).dtype == dtype


def test_memory_that_was_not_written_gets_the_form_that_was_asked_for() -> None:
    for form in ('identity', 'paper'):
        gate = SEM(16, device='meta', init=form)
        assert f'form={form!r}' in repr(gate) and gate.form == form
        with torch.no_grad():
            gate.to_empty(device='cpu').gain.fill_(-7)
        gate.reset_parameters()
        assert gate.form == form and (gate.form == 'paper' or torch.equal(gate(X), X))
    asked = SEM(16, device='meta').set_form('paper')
    asked.to_empty(device='cpu').reset_parameters()
    assert asked.form == 'paper'
    loaded = SEM(16, device='meta')
    loaded.load_state_dict(both_forms()[0].state_dict(), assign=True)
    assert loaded.form == 'paper'


@pytest.mark.parametrize('average', [ModelEmaV2, ModelEmaV3])
def test_averages_over_a_training_keep_the_form_and_load(average: Any) -> None:
    for gate in both_forms():
        ema = average(gate, decay=0.9973)
        for _ in range(300):
            ema.update(gate)
        assert ema.module.form == gate.form
        gate.load_state_dict(ema.module.state_dict())
        torch.testing.assert_close(gate(X), ema.module(X))


@pytest.mark.parametrize('build', [SEM, Excitation])
@pytest.mark.parametrize('form', ['identity', 'paper'])
def test_state_dicts_of_version_0_1_0_load(build: type[Any], form: Any) -> None:
    old = stirred(build(16, init=form))
    state = of_version_0_1_0(old.state_dict())
    assert '_extra_state' in state and 'gain' not in state
    for other in ('identity', 'paper'):
        gate = build(16, init=other)
        gate.load_state_dict(state)
        assert gate.form == form and torch.equal(gate(X), old(X))
        inside = nn.Sequential(nn.Identity(), build(16, init=other))
        inside.load_state_dict({f'1.{key}': tensor for key, tensor in state.items()})
        assert torch.equal(inside(X), old(X))
    with pytest.raises(RuntimeError, match=r'Missing key.*gain'):
        build(16).load_state_dict({key: tensor for key, tensor in state.items() if key != '_extra_state'})


def test_a_variant_loads_what_version_0_1_0_wrote() -> None:
    model = timm.create_model('test_resnet_sem', sem_init='paper').eval()
    state = of_version_0_1_0(model.state_dict())
    assert sum(key.endswith('_extra_state') for key in state) > 1
    other = timm.create_model('test_resnet_sem', sem_init='identity').eval()
    other.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))
    overlay = dict(state_dict=state, num_classes=1000)
    pretrained = timm.create_model('test_resnet_sem', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(pretrained(x), model(x))


def test_a_gate_becomes_an_identity_and_keeps_its_other_weights() -> None:
    for gate in (stirred(SEM(16, init='paper')), stirred(Excitation(16, 'ie', init='identity'))):
        before = {key: tensor.clone() for key, tensor in gate.state_dict().items()}
        assert gate.can_be_identity and not torch.equal(gate(X), X)
        gate.become_identity()
        assert torch.equal(gate(X), X) and gate.form == 'identity'
        changed = {key for key, tensor in gate.state_dict().items() if not torch.equal(tensor, before[key])}
        assert 'decision.weight' not in changed and 'operators.se.fc1.weight' not in changed


class WithoutZero(nn.Linear):
    """An operator that cannot start at zero."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, channels, device=device, dtype=dtype)


def test_a_gate_of_operators_that_cannot_be_zero_becomes_no_identity() -> None:
    gate = Excitation(16, WithoutZero, init='paper')
    before = gate.state_dict()
    assert not gate.can_be_identity
    with pytest.raises(OptionError):
        gate.become_identity()
    assert all(torch.equal(tensor, before[key]) for key, tensor in gate.state_dict().items())
