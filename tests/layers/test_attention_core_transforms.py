"""What PyTorch makes of every attention core: derivatives, maps, programs, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

from sem_timm.layers.attention_cores import attention_core_class
from tests.layers.attention_inputs import NAMES, OPTIONS, TOKENS, build, close, in_forward_mode, inputs
from tests.thorough import first_of_each
from tests.versions import free_batch


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('num_heads', [1, 3])
def test_gradients_are_the_numerical_ones_and_reach_every_parameter(name: str, num_heads: int) -> None:
    core = build(name, head_dim=3, value_dim=2, num_heads=num_heads)
    arguments = tuple(x.requires_grad_() for x in inputs(core, 3, queries=TOKENS))
    assert torch.autograd.gradcheck(core, arguments, fast_mode=True)
    core(*arguments).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in core.parameters())


# What PyTorch has no batching rule for is done sample by sample: slow, not wrong.
@pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_vmap_maps_inputs_masks_and_parameters(name: str, frozen: bool, grad: bool) -> None:
    core = build(name, num_heads=3).requires_grad_(not frozen)
    arguments = inputs(core, 4, 2, 3, queries=TOKENS)
    first = [x[0] for x in arguments]
    masks = torch.rand(4, 2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.8
    states = {key: torch.stack([parameter, 2 * parameter]) for key, parameter in core.named_parameters()}
    with torch.set_grad_enabled(grad):
        close(vmap(core)(*arguments), torch.stack([core(*(x[i] for x in arguments)) for i in range(4)]))
        for position, argument in enumerate(arguments):
            given = [*first[:position], argument, *first[position + 1 :]]
            one = vmap(core, in_dims=tuple(0 if x is argument else None for x in given))(*given)
            expected = [core(*first[:position], x, *first[position + 1 :]) for x in argument]
            close(one, torch.stack(expected))
        expected = [core(*first, attn_mask=mask) for mask in masks]
        close(vmap(lambda mask: core(*first, attn_mask=mask))(masks), torch.stack(expected))
        if states:
            both = vmap(lambda state: functional_call(core, state, tuple(first)))(states)
            twice = functional_call(core, {key: value[1] for key, value in states.items()}, tuple(first))
            close(both, torch.stack([core(*first), twice]))


@in_forward_mode
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_derivatives_in_forward_mode_are_the_numerical_ones(name: str, frozen: bool, grad: bool) -> None:
    core = build(name, num_heads=3).requires_grad_(not frozen)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    tangents = tuple(x.flip(-1, -2) for x in arguments)
    step = 1e-5
    ahead, behind = ([x + sign * step * t for x, t in zip(arguments, tangents)] for sign in (1, -1))
    with torch.set_grad_enabled(grad):
        numerical = (core(*ahead) - core(*behind)).detach() / (2 * step)
        derivative = jvp(core, arguments, tangents)[1].detach()
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(x, t) for x, t in zip(arguments, tangents))
            tangent = forward_ad.unpack_dual(core(*duals)).tangent
    close(derivative, tangent.detach())
    # The error of the difference quotient.
    torch.testing.assert_close(derivative, numerical, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'grad'),
    first_of_each([('external', True), *((name, False) for name in NAMES)], lambda name, grad: grad),
)
def test_compiles_whole(name: str, grad: bool) -> None:
    torch.compiler.reset()
    core = build(name, num_heads=3)
    compiled = torch.compile(core, fullgraph=True, backend='aot_eager')
    mask = (torch.arange(TOKENS) < TOKENS - 3).view(1, 1, 1, -1)
    for batch, given in ((2, None), (3, None), (2, mask)):
        arguments = inputs(core, batch, 3, queries=TOKENS)
        with torch.set_grad_enabled(grad):
            close(compiled(*arguments, attn_mask=given), core(*arguments, attn_mask=given))


@pytest.mark.parametrize('name', first_of_each(NAMES))
@pytest.mark.parametrize('grad', [False, True])
def test_exports_with_a_free_batch(name: str, grad: bool) -> None:
    core = build(name, num_heads=3)
    arguments = inputs(core, 3, 3, queries=TOKENS)
    batch = free_batch()
    with torch.set_grad_enabled(grad):
        shapes = tuple({0: batch} for _ in arguments)
        program = torch.export.export(core, arguments, dynamic_shapes=shapes).module()
        for size in (3, 2):
            close(program(*(x[:size] for x in arguments)), core(*(x[:size] for x in arguments)))


@pytest.mark.parametrize('name', first_of_each(name for name in NAMES if name not in ('halo', 'monarch')))
@pytest.mark.parametrize('grad', [False, True])
def test_exports_with_a_free_number_of_tokens(name: str, grad: bool) -> None:
    core = build(name, num_heads=3)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    tokens = torch.export.Dim('tokens')
    with torch.set_grad_enabled(grad):
        shapes = tuple({2: tokens} for _ in arguments)
        program = torch.export.export(core, arguments, dynamic_shapes=shapes).module()
        for count in (TOKENS, 8):
            close(program(*(x[:, :, :count] for x in arguments)), core(*(x[:, :, :count] for x in arguments)))


@pytest.mark.parametrize('name', first_of_each(NAMES))
def test_exports_with_a_mask(name: str) -> None:
    core = build(name, num_heads=3)
    arguments = inputs(core, 3, 3, queries=TOKENS)
    mask = torch.arange(TOKENS).expand(3, 1, 1, -1) < TOKENS - 3
    batch = free_batch()
    given = (*arguments, mask)
    program = torch.export.export(core, given, dynamic_shapes=tuple({0: batch} for _ in given)).module()
    for size in (3, 2):
        close(program(*(x[:size] for x in given)), core(*(x[:size] for x in given)))


@pytest.mark.parametrize('name', NAMES)
def test_copies_pickles_and_meta_work(name: str) -> None:
    core = build(name, num_heads=3)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    for clone in (copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        assert torch.equal(clone(*arguments), core(*arguments))
    on_meta = attention_core_class(name)(6, 5, 3, device='meta', **OPTIONS.get(name, {}))
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert on_meta(*(x.to('meta', torch.float32) for x in arguments)).shape == (2, 3, TOKENS, 5)
