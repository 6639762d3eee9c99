"""Cross-sample attention: its formula, its fusion, its dictionary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers.cross_sample import CrossSampleAttention
from tests.layers.attention_inputs import both_modes, close, inputs, trained


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook formula."""
    scores = torch.exp(torch.einsum('...nd,...md->...nm', q, k) / q.shape[-1] ** 0.5)
    return torch.einsum('...nm,...mv->...nv', scores / scores.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(('batch', 'queries', 'keys', 'width', 'value', 'entries'), [
    (1, 1, 1, 1, 1, 1), (2, 7, 7, 5, 3, 11), (3, 35, 13, 8, 8, 4),
])  # fmt: skip
@pytest.mark.parametrize('heads', [1, 3])
def test_output_follows_the_published_equations(
    batch: int, queries: int, keys: int, width: int, value: int, entries: int, heads: int
) -> None:
    core = trained(CrossSampleAttention(width, value, heads, dictionary=entries, dtype=torch.float64))
    q, k, v = inputs(core, batch, 3, queries=queries, keys=keys)
    parameters = {key: parameter.detach() for key, parameter in core.named_parameters()}
    for out in both_modes(lambda: core(q, k, v)):
        for head in range(3):
            own = {key: p[head] if heads > 1 else p for key, p in parameters.items()}
            both = torch.cat((
                softmax_attention(q[:, head], k[:, head], v[:, head]),
                softmax_attention(q[:, head], own['dictionary_key'], own['dictionary_value']),
            ), dim=-1)  # fmt: skip
            close(out[:, head], both @ own['fusion_weight'] + own['fusion_bias'])


@pytest.mark.parametrize('num_heads', [1, 3])
def test_the_fusion_starts_as_in_sample_attention(num_heads: int) -> None:
    core = CrossSampleAttention(6, 4, num_heads, dictionary=8, dtype=torch.float64)
    q, k, v = inputs(core, 2, 3, queries=7)
    out = core(q, k, v)
    close(out.detach(), softmax_attention(q, k, v))
    out.square().sum().backward()
    assert core.fusion_weight.grad is not None and core.fusion_weight.grad.abs().amin() > 0
    assert all(parameter.grad is not None for parameter in core.parameters())


def test_paper_init_draws_a_small_positive_dictionary() -> None:
    core = CrossSampleAttention(32, dictionary=500, init='paper')
    for table in (core.dictionary_key.detach(), core.dictionary_value.detach()):
        assert float(table.min()) >= 0 and float(table.max()) < 0.01
        assert float(table.mean()) == pytest.approx(0.005, rel=0.05)
    assert core.fusion_weight.shape == (64, 32) and bool(core.fusion_bias.any())
    assert CrossSampleAttention(32).dictionary_key.shape == (512, 32)
    assert "dictionary=500, init='paper'" in repr(core)


def test_the_dictionary_holds_the_centres_of_clusters() -> None:
    torch.manual_seed(0)
    centers = 10 * torch.eye(4, 6)
    core = CrossSampleAttention(6, 2, dictionary=4)
    labels = torch.arange(4).repeat_interleave(50)
    keys = (centers[labels] + 0.01 * torch.randn(200, 6)).view(4, 50, 6)
    values = labels.view(4, 50, 1).expand(4, 50, 2).float()
    # A seed whose first centres come from all four clusters; k-means finds no lost cluster again.
    for seed in range(100):
        chosen = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:4]
        if len(set(labels[chosen].tolist())) == 4:
            break
    core.init_dictionary(keys, values, generator=torch.Generator().manual_seed(seed))
    order = core.dictionary_value[:, 0].argsort()
    torch.testing.assert_close(core.dictionary_key[order].detach(), centers, rtol=0, atol=0.01)
    assert torch.equal(core.dictionary_value[order, 0].detach(), torch.arange(4.0))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_every_head_has_its_own_dictionary_and_the_seed_decides(dtype: torch.dtype) -> None:
    core = CrossSampleAttention(6, num_heads=3, dictionary=5, dtype=dtype)
    keys = torch.randn(2, 3, 20, 6).to(dtype) + torch.arange(0, 300, 100).view(3, 1, 1)
    drawn = []
    for seed in (0, 0, 1):
        core.init_dictionary(keys, generator=torch.Generator().manual_seed(seed))
        drawn.append(core.dictionary_key.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    close(drawn[0].mean((1, 2)).div(100).round().double(), torch.arange(3.0, dtype=torch.float64))
    torch.testing.assert_close(core.dictionary_value.detach(), drawn[2])
    core.init_dictionary(keys)


def test_dictionaries_that_cannot_be_are_refused() -> None:
    core = CrossSampleAttention(6, 4, dictionary=30)
    before = {key: value.clone() for key, value in core.state_dict().items()}
    keys, values = torch.randn(2, 20, 6), torch.randn(2, 20, 4)
    with pytest.raises(OptionError, match='20 vectors for 30 clusters'):
        core.init_dictionary(keys[0], values[0])
    with pytest.raises(OptionError, match=r'value_dim is 4\. Pass values='):
        core.init_dictionary(keys)
    with pytest.raises(OptionError, match=r'value_dim is 4\. Pass values='):
        core.init_dictionary(keys, values[:, :3])
    with pytest.raises(OptionError, match='head_dim=6'):
        core.init_dictionary(values)
    with pytest.raises(OptionError, match='iterations=0'):
        core.init_dictionary(keys, values, iterations=0)
    assert all(torch.equal(value, before[key]) for key, value in core.state_dict().items())


@pytest.mark.parametrize(('options', 'message'), [
    (dict(dictionary=0), 'dictionary=0'),
    (dict(init='papr'), r"init='papr' is unknown\. Close: paper"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CrossSampleAttention(8, **options)
