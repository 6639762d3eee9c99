"""Maps of external memories against the attention computed by hand, on the grids of several families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import sem_timm
from sem_timm.errors import ModelError, NoMatchError, OptionError, RefusedError
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.thorough import first_of_each

pytestmark = pytest.mark.filterwarnings('ignore::sem_timm.SwapWarning')

IMAGE = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(3))


def model_of(architecture: str = 'test_vit', operation: str | None = 'external', **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=10, **options)
        return model if operation is None else sem_timm.patch_model(model, operation)


def vit(operation: str | None = 'external', **options: Any) -> nn.Module:
    return model_of('test_vit', operation, img_size=(64, 96), **options)


def queries_of(model: nn.Module, name: str, image: Tensor) -> Tensor:
    """What a core is given."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(image.unsqueeze(0))
    handle.remove()
    return seen[0]


def test_maps_are_the_attention_of_each_head_and_slot() -> None:
    model = vit(reg_tokens=4)
    found = sem_timm.attention_map(model, IMAGE)
    core: Any = model.get_submodule('blocks.5.attn.core')
    queries = queries_of(model, 'blocks.5.attn.core', IMAGE)[0]
    logits = queries @ core.mk  # (heads, N, S)
    attention = logits.softmax(1)
    attention = (attention / attention.sum(2, keepdim=True))[:, 5:]  # the class token and four registers
    assert found.layer == 'blocks.5.attn.core' and found.maps.shape == (2 * 64, 4, 6)
    expected = attention.mT.reshape(2 * 64, 4, 6)
    torch.testing.assert_close(found.maps, expected.detach(), rtol=1e-4, atol=1e-7)
    assert found.heads == (0,) * 64 + (1,) * 64 and found.slots == (*range(64), *range(64))
    assert found.labels[65] == 'head 1, slot 1'


def test_marked_patch_is_where_its_slot_looks() -> None:
    """A memory slot made equal to one token's query looks there, and nowhere else as much."""
    model = vit()
    core: Any = model.get_submodule('blocks.0.attn.core')
    query = queries_of(model, 'blocks.0.attn.core', IMAGE)[0, 1, 1 + 2 * 6 + 5]  # head 1, row 2, column 5
    with torch.no_grad():
        core.mk.zero_()
        core.mk[1, :, 7] = 20 * query / query.norm() ** 2 * 5
    (map_,) = sem_timm.attention_map(model, IMAGE, layer=0, heads=1, slots=7).maps
    assert divmod(int(map_.argmax()), 6) == (2, 5)


def test_chosen_slots_and_heads_are_those_of_all() -> None:
    model = vit()
    every = sem_timm.attention_map(model, IMAGE)
    some = sem_timm.attention_map(model, IMAGE, heads=[1], slots=[3, -1])
    assert some.slots == (3, 63) and some.heads == (1, 1)
    assert torch.equal(some.maps, every.maps[[64 + 3, 64 + 63]])


@pytest.mark.parametrize('slots', [numpy.int64(2), [numpy.int32(2)], numpy.array([2]), torch.tensor(2)])
def test_numbers_of_slots_may_be_those_of_an_array(slots: Any) -> None:
    found = sem_timm.attention_map(vit(), IMAGE, slots=slots, heads=numpy.int64(1))
    assert found.labels == ('head 1, slot 2',)


def test_heads_that_share_a_memory_are_averaged_unless_chosen() -> None:
    model = vit('eamlp')
    mean = sem_timm.attention_map(model, IMAGE)
    each = [sem_timm.attention_map(model, IMAGE, heads=head).maps for head in range(8)]
    assert set(mean.heads) == {None} and mean.maps.shape == (64, 4, 6)
    torch.testing.assert_close(mean.maps, torch.stack(each).mean(0))
    torch.testing.assert_close(mean.maps.sum(0), torch.ones(4, 6))
    built = model_of('test_vit', None, img_size=(64, 96), attn_layer=sem_timm.MultiHeadExternalAttention)
    assert sem_timm.attention_map(built, IMAGE).layer == 'blocks.5.attn'


@pytest.mark.parametrize(
    ('architecture', 'options', 'layer', 'grid'),
    first_of_each(
        [
            ('deit_tiny_distilled_patch16_224', {'img_size': 64, 'depth': 1}, 0, (4, 4)),
            ('vit_tiny_patch16_224', {'dynamic_img_size': True, 'depth': 1}, 0, (4, 6)),
            ('pvt_v2_b0', {}, 0, (16, 24)),
            ('pvt_v2_b0', {}, -1, (2, 3)),
            ('test_coatnet', {'img_size': 64}, 0, (4, 4)),
            ('beit_base_patch16_224', {'img_size': 64, 'depth': 1}, 0, (4, 4)),
        ],
        count=2,
    ),
)
def test_grid_is_that_of_the_tokens(
    architecture: str, options: dict[str, Any], layer: int, grid: tuple[int, int]
) -> None:
    image = IMAGE[:, :, :64] if options.get('img_size') else IMAGE
    maps = sem_timm.attention_map(model_of(architecture, **options), image, layer=layer).maps
    assert maps.shape[1:] == grid


def test_tokens_in_the_order_of_mask_units_are_refused() -> None:
    model = model_of('hiera_tiny_224', embed_dim=8, stages=(1, 1, 1, 1))
    image = torch.randn(3, 224, 224)
    with refused(model, RefusedError, 'blocks.2.attn.core', 'mask units', 'from blocks.3 on'):
        sem_timm.attention_map(model, image, layer='blocks.2.attn')
    assert sem_timm.attention_map(model, image, layer='blocks.3.attn').maps.shape[-2:] == (7, 7)


def test_windows_are_refused_and_a_window_that_covers_all_is_not() -> None:
    options = {'img_size': 64, 'window_size': 4, 'embed_dim': 24, 'depths': (1, 1, 1), 'num_heads': (2, 2, 2)}
    model = model_of('swin_tiny_patch4_window7_224', **options)
    with refused(model, RefusedError, 'layers.0.blocks.0.attn.core', '16 windows of 16 tokens', 'global'):
        sem_timm.attention_map(model, IMAGE[:, :, :64], layer=0)
    assert sem_timm.attention_map(model, IMAGE[:, :, :64], layer=2).maps.shape[1:] == (4, 4)


@pytest.mark.parametrize(
    ('architecture', 'options', 'operation', 'layer', 'part'),
    first_of_each(
        [
            ('mobilevit_xxs', {}, 'external2d', -1, '4 windows of 4 tokens'),
            ('mobilevitv2_050', {}, 'external2d', 'stages.3.1.transformer.0', 'lie as 4 × 16'),  # places × patches
            ('nest_tiny', {'img_size': 112}, 'external', -1, 'lie as 1 × 49'),
        ],
        count=2,
    ),
)
def test_feature_maps_that_are_windows_are_refused(
    architecture: str, options: dict[str, Any], operation: str, layer: int | str, part: str
) -> None:
    model = model_of(architecture, operation, **options)
    with refused(model, RefusedError, part):
        sem_timm.attention_map(model, torch.zeros(3, 112, 112), layer=layer)


def test_blocks_of_feature_maps_show_their_positions() -> None:
    model = model_of('test_resnet', 'external2d')
    found = sem_timm.attention_map(model, IMAGE, layer='layer1.0')
    assert found.layer == 'layer1.0.external2d' and set(found.heads) == {None}
    torch.testing.assert_close(found.maps.sum(0), torch.ones(found.maps.shape[1:]))


@pytest.mark.parametrize('size', [(64, 96), (32, 128)])  # 24 tokens lie in a column there, 16 in a square
def test_tokens_that_were_laid_out_otherwise_are_put_where_they_belong(size: tuple[int, int]) -> None:
    model = model_of('test_vit', 'external2d', img_size=size)
    image = torch.randn(3, *size)
    found = sem_timm.attention_map(model, image, layer=0)
    core: Any = model.get_submodule(found.layer)
    seen = queries_of(model, found.layer, image)
    expected = core.attention(seen).detach().flatten(2).unflatten(2, (size[0] // 16, size[1] // 16))[0]
    torch.testing.assert_close(found.maps, expected)


def test_photograph_is_transformed_as_the_model_wants_it() -> None:
    model = vit()
    pixels = torch.arange(64 * 96 * 3).remainder(251).to(torch.uint8).reshape(64, 96, 3).numpy()
    found = sem_timm.attention_map(model, Image.fromarray(pixels).convert('L'))
    assert found.image.shape == (64, 96, 3) and found.maps.shape[1:] == (4, 6)
    assert found.image.min() >= 0 and found.image.max() <= 1


def test_photograph_is_grey_where_the_model_takes_one_channel() -> None:
    found = sem_timm.attention_map(vit(in_chans=1), Image.new('RGB', (96, 64), (51, 51, 51)))
    torch.testing.assert_close(found.image, torch.full((64, 96, 3), 0.2))


@pytest.mark.parametrize('channels', [2, 4])
def test_photograph_is_refused_where_it_has_other_channels(channels: int) -> None:
    model = vit(in_chans=channels)
    with refused(
        model, OptionError, f'takes {channels} channels', f'tensor (C, H, W), such as of ({channels}, 64, 96)'
    ):
        sem_timm.attention_map(model, Image.new('RGB', (96, 64)))


def test_image_may_require_gradients(tmp_path: Path) -> None:
    found = sem_timm.attention_map(vit(), IMAGE.clone().requires_grad_())
    assert found.overlay(tmp_path / 'slots.png', most=1).exists()


@pytest.mark.parametrize('channels', [1, 3, 5])
def test_image_is_shown_as_it_was(channels: int) -> None:
    model = vit(in_chans=channels)
    found = sem_timm.attention_map(model, torch.randn(channels, 64, 96))
    assert found.image.shape == (64, 96, 3) and 0 <= found.image.min() < found.image.max() <= 1


def test_normalisation_is_undone() -> None:
    picture = torch.rand(3, 64, 96)
    config = timm.data.resolve_data_config({}, model=vit(None))
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    found = sem_timm.attention_map(vit(), (picture - mean) / std)
    torch.testing.assert_close(found.image, picture.permute(1, 2, 0))


def test_model_stays_as_it_is() -> None:
    model = vit().train()
    before = snapshot(model)
    sem_timm.attention_map(model, IMAGE)
    assert_same(before, snapshot(model))


def test_a_model_without_unread_parameters_is_seen_as_well() -> None:
    model = vit()
    before = sem_timm.attention_map(model, IMAGE)
    after = sem_timm.attention_map(sem_timm.drop_unread_parameters(copy.deepcopy(model)), IMAGE)
    assert torch.equal(before.maps, after.maps)


@pytest.mark.parametrize(
    ('given', 'error', 'parts'),
    [
        ({'layer': 6}, NoMatchError, ('6 layers', 'blocks.0.attn.core to blocks.5.attn.core')),
        ({'layer': 'blocks.9'}, NoMatchError, ("'blocks.9'", 'blocks.5.attn.core')),
        ({'slots': 64}, OptionError, ('slots=64', 'has 64')),
        ({'slots': []}, OptionError, ('slots=[]',)),
        ({'slots': 1.5}, OptionError, ('slots=1.5', 'has 64')),
        ({'slots': slice(2)}, OptionError, ('slots=slice', 'has 64')),
        ({'slots': [True]}, OptionError, ('slots=[True]', 'has 64')),
        ({'heads': 'all'}, OptionError, ("heads='all'", 'has 2')),
        ({'image': IMAGE * float('nan')}, ModelError, ('blocks.5.attn.core', 'not finite')),
        ({'heads': [0, 2]}, OptionError, ('heads=[0, 2]', 'has 2')),
        ({'image': IMAGE.unsqueeze(0).repeat(2, 1, 1, 1)}, OptionError, ('(2, 3, 64, 96)', 'one normalised image')),
        ({'image': IMAGE.byte()}, OptionError, ('uint8',)),
        ({'image': 'cat.png'}, OptionError, ('str', 'PIL')),
    ],
)
def test_what_is_not_there_is_refused(given: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    model = vit()
    with refused(model, error, *parts):
        sem_timm.attention_map(model, **{'image': IMAGE, **given})


@pytest.mark.parametrize('operation', [None, 'efficient', 'sem'])
def test_models_without_slots_are_refused(operation: str | None) -> None:
    model = vit(operation)
    with refused(model, ModelError, 'no External Attention', "patch_model(model, 'external')"):
        sem_timm.attention_map(model, IMAGE)


@pytest.mark.parametrize(
    ('shape', 'parts'),
    [
        ((3, 96, 64), ('(3, 64, 96) and was given (3, 96, 64)', 'img_size=(96, 64)', 'dynamic_img_size=True')),
        ((1, 64, 96), ('(3, 64, 96) and was given (1, 64, 96)', 'create_transform')),
    ],
)
def test_image_of_a_shape_that_the_model_refuses(shape: tuple[int, ...], parts: tuple[str, ...]) -> None:
    model = vit(dynamic_img_size=False)
    with refused(model, OptionError, *parts):
        sem_timm.attention_map(model, torch.zeros(shape))


class OutOfMemory(nn.Module):
    """Fails with values, though not without."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise RuntimeError('no more memory')
        return x


def test_what_else_goes_wrong_in_a_model_stays_what_it_is() -> None:
    model = model_of('test_vit', 'external', img_size=64, dynamic_img_size=True)
    model.patch_embed.register_module('norm', OutOfMemory())
    with refused(model, RuntimeError, 'no more memory'):
        sem_timm.attention_map(model, torch.zeros(3, 96, 64))


def test_overlay_is_drawn(tmp_path: Path) -> None:
    found = sem_timm.attention_map(vit(), IMAGE)
    path = found.overlay(tmp_path / 'slots.png', most=5)
    with Image.open(path) as picture:
        assert picture.size[0] > 500
    assert repr(found) == "AttentionMap(layer='blocks.5.attn.core', 128 maps of 4 × 6 tokens)"
    with pytest.raises(OptionError, match='most=0'):
        found.overlay(path, most=0)
