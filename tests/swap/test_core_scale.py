"""The scale of the old logits reaches cores that read keys: plain attention in place of plain attention is the same."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import AttentionCore, RefusedError
from sem_timm.surgery import proof
from sem_timm.surgery.stand_in import StandIns
from tests.families import Family
from tests.refusals import refused
from tests.swap.classes import CLASSES
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import outputs, swap

SIZE = (3, 32, 32)


class PlainAttention(AttentionCore):
    """What the swapped modules of these tests had before."""

    takes_pairwise_mask: ClassVar[bool] = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        k, v = (x.expand(*q.shape[:-2], -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


# What position biases are computed from, which a swap drops.
_BIASES = ('bias_table', 'attention_biases', 'rel_pos_', 'rel_pos.mlp.fc2', '_rel', 'cpb_mlp.2', 'meta_mlp')


def without_biases(family: Family) -> nn.Module:
    model = family.create()
    for name, parameter in model.named_parameters():
        if any(part in name for part in _BIASES):
            nn.init.zeros_(parameter)
    for module in model.modules():
        if getattr(module, 'attn_mask', None) is not None:
            module.attn_mask.zero_()
        if hasattr(module, 'dynamic_mask'):
            module.dynamic_mask, module.shift_size = False, (0, 0)
    return model


def assert_reproduced(family: Family) -> None:
    """A model without position biases computes the same with plain attention in place of its own."""
    base, model = without_biases(family), without_biases(family)
    swap(model, PlainAttention, input_size=family.input_size)
    for expected, output in zip(outputs(base, family.images()), outputs(model, family.images()), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


# Classes whose logits are scaled in different ways; `test_terms` has all others.
SCALES = (
    'models.swin_transformer.WindowAttention',  # queries are scaled before the product
    'models.swin_transformer_v2.WindowAttention',  # cosines with a parameter of each head
    'models.swin_transformer_v2_cr.WindowMultiHeadAttention',
    'models.efficientvit_msra.CascadedGroupAttention',  # queries are scaled and then transposed
    'models.mvitv2.MultiScaleAttention',
    'models.gcvit.WindowAttentionGlobal',
    'models.gemma4_vit.Gemma4Attention',  # a call with scale=1
    'models.visformer.Attention',  # products are scaled
    'layers.attention.Attention',
)


@pytest.mark.parametrize('name', SCALES)
def test_plain_attention_reproduces_the_old_one(name: str) -> None:
    assert_reproduced(CLASSES[name])


class Scaled(Projected):
    """One of many ways to write a scale."""

    number = 0.7

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.temperature = nn.Parameter(torch.tensor([[[1.3]], [[0.4]]]))
        self.single = nn.Parameter(torch.tensor(1.7))
        self.per_pair = nn.Parameter(torch.rand(16, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.form.startswith('call'):
            q = q * self.number if self.form == 'call_with_scaled_queries' else q
            return F.scaled_dot_product_attention(q, k, v, scale=0.9 if self.form == 'call_with_a_scale' else None)
        logits: Tensor = getattr(self, self.form)(q, k)
        return logits.softmax(-1) @ v

    def nothing(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    def before(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.number) @ k.mT

    def before_in_place(self, q: Tensor, k: Tensor) -> Tensor:
        q = q + 0
        q *= self.number
        return q @ k.mT

    def both_sides(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * 8**-0.25) @ (k * 8**-0.25).transpose(-2, -1)

    def divided(self, q: Tensor, k: Tensor) -> Tensor:
        return (q / 3.0 @ k.mT) / 0.8

    def negative(self, q: Tensor, k: Tensor) -> Tensor:
        return 1.0 - 0.5 * (q @ k.mT)

    def by_width(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5

    def by_tokens(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * k.size(-2) ** -0.5

    def per_head(self, q: Tensor, k: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.exp()

    def over_a_parameter(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) / self.single * 1.5

    def several(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q @ k.mT) * self.temperature * 2.0).mul(self.single)


FORMS = [name for name in vars(Scaled) if name not in ('number', 'attend') and not name.startswith('__')]
FORMS += ['call', 'call_with_a_scale', 'call_with_scaled_queries']


@pytest.mark.parametrize('form', FORMS)
def test_forms_of_a_scale(form: str) -> None:
    model = Model(Scaled(form)).eval()
    images, larger = torch.randn(2, *SIZE), torch.randn(1, 3, 48, 40)
    expected = [*outputs(model, images), *outputs(model, larger)]
    swap(model, PlainAttention, input_size=SIZE)
    for output, old in zip([*outputs(model, images), *outputs(model, larger)], expected, strict=True):
        torch.testing.assert_close(output, old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', ['call', 'by_width'])
def test_nothing_is_multiplied_where_the_scale_is_the_usual_one(form: str) -> None:
    code = sem_timm.plan_model(Model(Scaled(form)), 'caam', input_size=SIZE).code('attention')
    assert ' * ' not in code and 'mul' not in code


def test_attentions_that_read_no_keys_get_the_queries_as_they_entered_the_product() -> None:
    model = Model(Scaled('before'))
    assert ' * 0.7' in sem_timm.plan_model(model, 'external', input_size=SIZE).code('attention')
    model = Model(Scaled('per_head'))
    assert 'temperature' not in sem_timm.plan_model(model, 'external', input_size=SIZE).code('attention')
    assert 'attention.temperature' not in sem_timm.plan_model(model, 'catt', input_size=SIZE).unread


WITH_FACTORS = {'by_tokens', 'per_head', 'over_a_parameter', 'several'}


@pytest.mark.parametrize('form', [form for form in FORMS if form not in WITH_FACTORS])
def test_the_number_on_products_of_queries_and_keys_as_they_enter_the_core(form: str) -> None:
    model = Model(Scaled(form)).eval()
    plan = sem_timm.plan_model(model, 'external', input_size=SIZE)
    (core,) = plan.originals['attention'].cores.values()
    assert not core.scale.factors
    tokens = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(0))
    (old,) = plan.originals['attention'].compute(model.attention, {'x': tokens}).values()
    attention = (old.query @ old.key.mT * core.scale.of_products).softmax(-1)
    torch.testing.assert_close(attention @ old.value, old.output, rtol=1e-4, atol=1e-5)


class PerPair(Scaled):
    """Every pair of tokens has a factor of its own."""

    def per_pair_of_tokens(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self.per_pair

    def inverse(self, q: Tensor, k: Tensor) -> Tensor:
        return 1.0 / (q @ k.mT)


@pytest.mark.parametrize(
    ('form', 'reason'),
    [('per_pair_of_tokens', 'multiplied by a tensor (16, 16)'), ('inverse', 'how its logits are scaled is not read')],
)
def test_what_cannot_be_put_into_queries_is_refused_by_what_reads_keys(form: str, reason: str) -> None:
    model = Model(PerPair(form))
    with refused(model, RefusedError, reason):
        sem_timm.patch_model(model, 'catt', input_size=SIZE)
    assert len(sem_timm.plan_model(model, 'external', input_size=SIZE)) == 1


class OverAxis(Projected):
    """Softmax over some axis of the logits."""

    def __init__(self, axis: int, as_module: bool) -> None:
        super().__init__()
        self.axis = axis
        self.softmax = nn.Softmax(axis) if as_module else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT
        return (logits.softmax(self.axis) if self.softmax is None else self.softmax(logits)) @ v


@pytest.mark.parametrize('as_module', [False, True])
@pytest.mark.parametrize('axis', [-2, 1, 2])
def test_a_softmax_over_another_axis_is_none_over_keys(axis: int, as_module: bool) -> None:
    model = Model(OverAxis(axis, as_module))
    with refused(model, RefusedError, 'its softmax is not over the keys'):
        sem_timm.patch_model(model, 'external', input_size=SIZE)
    for last in (-1, 3):
        assert len(sem_timm.plan_model(Model(OverAxis(last, as_module)), 'external', input_size=SIZE)) == 1


class TypeAsByKeyword(Projected):
    """Writes ``type_as(other=...)``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.type_as(other=k), k, v)


def test_a_type_that_is_lent_by_keyword() -> None:
    model = Model(TypeAsByKeyword())
    swap(model, 'external', input_size=SIZE)
    assert outputs(model, torch.randn(2, *SIZE))[0].isfinite().all()


class OtherInTraining(Projected):
    """Does something else in training, behind the core, and drops out by a function."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return F.dropout(out * 2, 0.3, self.training) if self.training else out


def test_what_training_adds_is_kept_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(OtherInTraining())
    plan = sem_timm.plan_model(model, PlainAttention, input_size=SIZE)
    assert 'if self.training' in plan.code('attention')
    checked: list[bool] = []

    def noted(reading: Any, module: Any, training: bool, **options: Any) -> StandIns:
        checked.append(training)
        return StandIns(reading, module, training, **options)

    monkeypatch.setattr(proof, 'StandIns', noted)
    sem_timm.plan_model(Model(_OtherClass()), PlainAttention, input_size=SIZE)
    assert checked == [False, True]


class _OtherClass(OtherInTraining):
    """As the other one, not planned before."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return out * 3 if self.training else out


def test_the_width_of_small_models() -> None:
    assert WIDTH // 2 == 8  # what some of the scales above are written for
