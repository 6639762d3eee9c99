"""The channel axis is found where sizes cannot tell it apart."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import sem_timm
from sem_timm import ExcitationConfig
from tests.lively import lively
from tests.surgery.gates_by_hand import assert_gated_by_hand, instance_enhancement, vision_transformer
from tests.versions import weightless


def test_as_many_tokens_as_channels() -> None:
    model = vision_transformer(class_token=False, global_pool='avg')
    gates = instance_enhancement(model, branches='all')
    plan = sem_timm.plan_model(vision_transformer(class_token=False, global_pool='avg'), branches='all')
    assert {(site.shape, site.layout, site.channels, site.channel_dim) for site in plan} == {
        ((2, 16, 16), 'NLC', 16, -1)
    }
    assert len(gates) == 4
    assert_gated_by_hand(model, torch.randn(3, 3, 64, 64), gates, (1,), (1, 16))


def test_as_many_rows_and_columns_as_channels_first() -> None:
    for model in (
        ConvNeXt(depths=(2, 1, 1, 1), dims=(16, 16, 16, 16), num_classes=10),
        ConvNeXt(depths=(2, 1, 1, 1), dims=(16, 16, 16, 16), num_classes=10, conv_mlp=True),
    ):
        plan = sem_timm.plan_model(model, input_size=(3, 64, 64))
        assert plan.sites[0].shape == (2, 16, 16, 16)
        assert {(site.layout, site.channels, site.channel_dim) for site in plan} == {('NCHW', 16, 1)}
        sem_timm.patch_model(
            model, ExcitationConfig(excitation='ie'), target='stages.0.blocks.0', input_size=(3, 64, 64)
        )
        gate = model.stages[0].blocks[0].ie
        nn.init.normal_(gate.operators.ie.gamma)
        assert_gated_by_hand(model, torch.randn(2, 3, 64, 64), {'stages.0.blocks.0': gate}, (2, 3), (16, 1, 1))


def test_as_many_rows_and_columns_as_channels_last() -> None:
    def swin() -> nn.Module:
        return SwinTransformer(
            img_size=32, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, num_classes=10, drop_path_rate=0
        )

    plan = sem_timm.plan_model(swin(), branches='all')
    assert [(site.attribute, site.shape, site.layout) for site in plan] == 2 * [
        ('sem1', (2, 8, 8, 8), 'NHWC'),
        ('sem2', (2, 64, 8), 'NLC'),
    ]
    model = swin()
    gates = instance_enhancement(model, branches='all')
    images = torch.randn(2, 3, 32, 32)
    first = {name: gate for name, gate in gates.items() if name.endswith('1')}
    second = {name: gate for name, gate in gates.items() if name.endswith('2')}
    assert len(first) == len(second) == 2
    assert_gated_by_hand(model, images, first, (1, 2), (1, 1, 8))
    assert_gated_by_hand(model, images, second, (1,), (1, 8))


def test_token_mixing_is_gated_by_the_channels_of_the_trunk() -> None:
    def mixer() -> nn.Module:
        return MlpMixer(img_size=64, embed_dim=16, num_blocks=2, num_classes=10)

    plan = sem_timm.plan_model(mixer(), position='residual', branches='all')
    assert len(plan) == 4
    assert {(site.shape, site.layout, site.channels) for site in plan} == {((2, 16, 16), 'NLC', 16)}
    model = mixer()
    gates = instance_enhancement(model, position='residual', branches='all')
    assert_gated_by_hand(model, torch.randn(2, 3, 64, 64), gates, (1,), (1, 16))


class Encoder(nn.Module):
    """A residual MLP on tokens or maps with channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Tokenized(nn.Module):
    """A convolution whose map becomes tokens in one of several ways; 16 tokens of 16 channels."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 2, 16))
        self.block = Encoder(16)
        self.mixing = Encoder(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.way == 'permute':
            x = x.permute(0, 2, 3, 1)
        elif self.way == 'permute_and_reshape':
            x = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 16)
        elif self.way == 'flatten_and_transpose':
            x = x.flatten(2).transpose(1, 2)
        elif self.way == 'flatten_and_mT':
            x = x.flatten(2).mT
        elif self.way == 'view_and_permute':
            x = x.view(x.shape[0], 16, -1).permute(0, 2, 1)
        elif self.way == 'einsum':
            x = torch.einsum('bchw->bhwc', x)
        elif self.way == 'movedim':
            x = torch.movedim(x, 1, -1)
        elif self.way == 'class_tokens':
            x = torch.cat((self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        elif self.way == 'class_tokens_behind':
            x = torch.cat((x.flatten(2).transpose(1, 2), self.token.expand(x.shape[0], -1, -1)), dim=1)
        return self.block(x)


@pytest.mark.parametrize(
    ('way', 'layout', 'prefix'),
    [
        ('permute', 'NHWC', 0),
        ('permute_and_reshape', 'NLC', 0),
        ('flatten_and_transpose', 'NLC', 0),
        ('flatten_and_mT', 'NLC', 0),
        ('view_and_permute', 'NLC', 0),
        ('einsum', 'NHWC', 0),
        ('movedim', 'NHWC', 0),
        ('class_tokens', 'NLC', 2),
        ('class_tokens_behind', 'NLC', 0),
    ],
)
def test_a_map_becomes_tokens(way: str, layout: str, prefix: int) -> None:
    for branch_from_a_linear_layer in (True, False):
        model = Tokenized(way)
        if not branch_from_a_linear_layer:
            model.block.mlp = Scaled(16)
        (site,) = sem_timm.plan_model(model, input_size=(3, 32, 32))
        assert (site.layout, site.num_prefix_tokens, site.channels) == (layout, prefix, 16)


class Scaled(nn.Module):
    """A branch that does not tell its channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() * self.gamma


class Volume(nn.Module):
    """A network of three spatial axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.block = ConvBlock(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class ConvBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Named(nn.Module):
    """Sums and products whose operands have names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.mix = nn.Parameter(torch.rand(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return torch.add(input=x, other=torch.matmul(input=self.linear(x), other=self.mix))


def test_operands_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), Named())
    (site,) = sem_timm.plan_model(model, target='1', position='residual', input_size=(3, 4, 4))
    assert (site.layout, site.channels) == ('NLC', 12)


def test_other_numbers_of_axes() -> None:
    model = Volume()
    (site,) = sem_timm.plan_model(model, input_size=(1, 8, 8, 8))
    assert (site.layout, site.shape, site.channels) == ('NCDHW', (2, 8, 8, 8, 8), 8)
    images = torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(before, sem_timm.patch_model(model, input_size=(1, 8, 8, 8))(images))


class ChannelsInTheMiddle(nn.Module):
    """Adds where the channels are neither first nor last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Middle()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) + self.conv(x).transpose(1, 2)


def test_channels_on_another_axis_are_refused() -> None:
    with pytest.raises(sem_timm.RefusedError, match='on axis 2, not first or last'):
        sem_timm.plan_model(ChannelsInTheMiddle(), input_size=(3, 8, 8))


@pytest.mark.parametrize('architecture', ['hiera_tiny_224', 'levit_128s', 'nest_tiny', 'tnt_s_patch16_224'])
def test_the_batch_axis_is_followed_through_reshapes(architecture: str) -> None:
    plan = sem_timm.plan_model(weightless(architecture))
    assert plan.refusals == ()


def test_gates_do_not_mix_samples_where_tokens_are_folded_into_the_batch() -> None:
    """MobileViT runs its transformer once for each pixel of a patch, with those pixels folded into the batch."""
    torch.manual_seed(0)
    model = lively(timm.create_model('mobilevit_xxs', num_classes=10)).eval()
    sem_timm.patch_model(model, input_size=(3, 64, 64))
    assert {record.class_name for record in sem_timm.patched_modules(model)} == {'Block', 'BottleneckBlock'}
    for name, parameter in model.named_parameters():
        if '.sem.' in name:
            torch.nn.init.normal_(parameter, std=0.2)
    first, second, other = torch.randn(3, 1, 3, 64, 64)
    with torch.no_grad():
        alone = model(torch.cat([first, second]))[0]
        torch.testing.assert_close(model(torch.cat([first, other]))[0], alone, rtol=1e-4, atol=1e-5)


class TokensFirst(nn.Module):
    """Tokens before samples, as in nn.MultiheadAttention by default."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.block = Encoder(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x).flatten(2).permute(2, 0, 1))


def test_samples_on_another_axis_are_refused() -> None:
    with pytest.raises(sem_timm.RefusedError, match='batch is not the first axis'):
        sem_timm.plan_model(TokensFirst(), input_size=(3, 32, 32))
