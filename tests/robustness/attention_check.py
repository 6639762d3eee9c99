"""What must hold for any attention: swapped, the rest computes what it computed, or the swap is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import AttentionCore, ModelError, RefusedError
from sem_timm.surgery.freeze import unread_parameters
from tests.robustness.attention_source import AttentionNetwork
from tests.robustness.network_check import Outcome
from tests.snapshot import assert_same, snapshot
from tests.twins import assert_equal, inserted


class Softmax(AttentionCore):
    """What it takes the place of: so nothing may change but the last bits."""

    reads_keys: ClassVar[bool] = True
    takes_pairwise_mask: ClassVar[bool] = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask)


def check_attention(drawn: AttentionNetwork, operation: Any = 'external') -> Outcome:
    """Swaps the attention of a network and looks at all that must not change.

    Args:
        drawn: The network.
        operation: A kind of attention; for `Softmax` the outputs must stay.

    Returns:
        What became of it.
    """
    base = drawn.build().eval()
    images = torch.randn(2, *drawn.network.size, generator=torch.Generator().manual_seed(1))
    expected = _outputs(base, images)
    model = drawn.build()
    before = snapshot(model)
    try:
        plan = sem_timm.plan_model(model, operation, input_size=drawn.network.size)
    except (RefusedError, ModelError) as error:
        assert_same(before, snapshot(model))
        return Outcome('refused', reasons=(str(error),))
    assert_same(before, snapshot(model))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(model, plan)
        rng = torch.get_rng_state()
        sem_timm.unpatch_model(model)
        assert_same({**before, 'rng': rng}, snapshot(model))
        sem_timm.patch_model(model, plan)
    _check_outputs(drawn, model.eval(), operation, images, expected)
    _check_gradients(copy.deepcopy(model).train(), images)
    assert [*base.state_dict()] == [key for key in model.state_dict() if key in base.state_dict()]
    sem_timm.unpatch_model(model)
    assert_equal(expected, _outputs(model.eval(), images))
    return Outcome('patched', tuple(site.position for site in plan), tuple(r.reason for r in plan.refusals))


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs: dict[str, Tensor] = model(images)
    return outputs


def _check_outputs(
    drawn: AttentionNetwork, model: nn.Module, operation: Any, images: Tensor, expected: dict[str, Tensor]
) -> None:
    for size in (1, 2, 3):
        got = _outputs(model, torch.cat([images, images])[:size])
        assert [*got] == [*expected]
        assert got['after'].shape == (size, *expected['after'].shape[1:])
        assert got['after'].isfinite().all()
    got = _outputs(model, images)
    assert torch.equal(expected['before'], got['before']) and torch.equal(expected['beside'], got['beside'])
    if operation is Softmax and drawn.plain:
        torch.testing.assert_close(got['after'], expected['after'], rtol=1e-4, atol=1e-4)  # another order of the sums
    elif operation is not Softmax:
        assert not torch.equal(got['after'], expected['after'])


def _check_gradients(model: nn.Module, images: Tensor) -> None:
    """What requires a gradient gets one, and what is said to be unread gets none."""
    outputs = model(images)
    torch.stack([out.square().mean() for out in outputs.values()]).sum().backward()
    unread = unread_parameters(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in unread), name
        assert parameter.requires_grad == (name not in unread), name
    for name, parameter in inserted(model).items():
        assert parameter.grad is not None and parameter.grad.any(), name
