"""The block of external attention for feature maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from sem_timm.errors import OptionError
from sem_timm.layers.external2d import ExternalAttention2d
from tests.layers.attention_inputs import both_modes, close, in_forward_mode, trained
from tests.versions import free_batch


def published(block: ExternalAttention2d, x: Tensor) -> Tensor:
    """The equations of the block in training mode, without the activation."""
    q = torch.einsum('bchw,kc->bkhw', x, block.conv1.weight[:, :, 0, 0]) + block.conv1.bias[:, None, None]
    scores = torch.exp(torch.einsum('bchw,cs->bshw', q, block.mk))
    softmax = scores / scores.sum((2, 3), keepdim=True)
    attention = softmax / (1e-9 + softmax.sum(1, keepdim=True))
    out = torch.einsum('bshw,sc,kc->bkhw', attention, block.mv, block.conv2.weight[:, :, 0, 0])
    centered = out - out.mean((0, 2, 3), keepdim=True)
    normal = centered / (centered.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    return x + normal * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]


@pytest.mark.parametrize(('channels', 'memory', 'size'), [(5, 3, (7, 4)), (8, 64, (1, 9)), (3, 1, (5, 5))])
@pytest.mark.parametrize('init', ['identity', 'paper'])
def test_output_follows_the_published_equations(channels: int, memory: int, size: tuple[int, int], init: Any) -> None:
    block = trained(ExternalAttention2d(channels, memory, init, dtype=torch.float64))
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    expected = published(block, x).detach()
    for out in both_modes(lambda: block(x)):
        close(out, expected.clamp(min=0) if init == 'paper' else expected)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_identity_is_exact_and_learns_at_once(
    training: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    block = ExternalAttention2d(16, dtype=dtype).train(training)
    x = torch.randn(2, 16, 5, 6).to(dtype).to(memory_format=memory_format)
    for out in both_modes(lambda: block(x)):
        assert out.dtype == dtype and torch.equal(out, x)
    (block(x) * torch.randn(2, 16, 5, 6)).sum().backward()
    assert block.norm.weight.grad is not None and block.norm.weight.grad.abs().min() > 0
    assert block.norm.bias.grad is not None and block.norm.bias.grad.abs().min() > 0


def test_autocast_keeps_the_identity() -> None:
    block, x = ExternalAttention2d(16), torch.randn(2, 16, 5, 6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(block(x), x)


def test_gradients_reach_every_parameter_after_the_first_step() -> None:
    block = trained(ExternalAttention2d(6, dtype=torch.float64))
    block(torch.randn(2, 6, 5, 4, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    # The bias of the first convolution is the same for all positions, which the softmax over them takes away.
    still = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.abs().max() < 1e-10}
    assert still == {'conv1.bias'}


def test_size_and_cost_are_the_published_ones() -> None:
    block = ExternalAttention2d(512, device='meta').eval()
    assert sum(parameter.numel() for parameter in block.parameters()) == 591_360
    with FlopCounterMode(display=False) as counter:
        block(torch.empty(1, 512, 128, 128, device='meta'))
    assert counter.get_total_flops() == 2 * 9_663_676_416


def test_memories_start_equal_and_are_two() -> None:
    for init in ('identity', 'paper'):
        block = ExternalAttention2d(32, 8, init)
        assert torch.equal(block.mv, block.mk.mT)
        assert block.mv.data_ptr() != block.mk.data_ptr()
        assert bool(block.norm.weight.any()) == (init == 'paper')
        with torch.no_grad():
            block.mk.add_(1)
        assert not torch.equal(block.mv, block.mk.mT)
        block.reset_parameters()
        assert torch.equal(block.mv, block.mk.mT)


def test_paper_init_draws_by_the_number_of_channels() -> None:
    torch.manual_seed(0)
    block = ExternalAttention2d(512, init='paper')
    for weight in (block.conv1.weight, block.conv2.weight, block.mk):
        assert float(weight.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.02)


def test_compiles_whole_exports_with_free_sizes_and_copies() -> None:
    block = trained(ExternalAttention2d(6, 4, 'paper', dtype=torch.float64)).eval()
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    expected = block(x)
    close(torch.compile(block, fullgraph=True, backend='aot_eager')(x), expected)
    sizes = {0: free_batch(), 2: torch.export.Dim('height'), 3: torch.export.Dim('width')}
    program = torch.export.export(block, (x,), dynamic_shapes=(sizes,)).module()
    for other in (x, x[:2, :, :3], x[..., :2]):
        close(program(other), block(other))
    assert torch.equal(copy.deepcopy(block)(x), expected)
    assert block(x[:0]).shape == (0, 6, 5, 4)
    assert "6, memory=4, init='paper'" in repr(block)


@in_forward_mode
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_function_transforms_give_what_they_should(frozen: bool, grad: bool) -> None:
    block = trained(ExternalAttention2d(6, 4, dtype=torch.float64)).eval().requires_grad_(not frozen)
    x = torch.randn(3, 2, 6, 5, 4, dtype=torch.float64)
    tangent, step = torch.randn_like(x[0]), 1e-5
    with torch.set_grad_enabled(grad):
        close(vmap(block)(x), torch.stack([block(sample) for sample in x]))
        derivative = jvp(block, (x[0],), (tangent,))[1]
        numerical = (block(x[0] + step * tangent) - block(x[0] - step * tangent)) / (2 * step)
    # The error of the difference quotient.
    torch.testing.assert_close(derivative, numerical, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(channels=0), 'channels=0'),
    (dict(memory=0), 'memory=0'),
    (dict(init='papr'), r"init='papr' is unknown\. Close: paper"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExternalAttention2d(**{'channels': 8, **options})


@pytest.mark.parametrize('shape', [(2, 8, 5), (2, 7, 5, 5), (8, 5, 5)])
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r'it needs \(B, 8, H, W\)'):
        ExternalAttention2d(8)(torch.randn(shape))
