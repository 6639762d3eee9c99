"""What timm offers for a model works for a swapped one."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import sem_timm
from sem_timm.compat import param_groups_layer_decay
from tests.families import Family
from tests.swap.classes import CLASSES
from tests.swap.swapping import backward, outputs, shapes, swap, swapped, without_gradient
from tests.thorough import first_of_each
from tests.twins import assert_equal, inserted
from tests.versions import TABLES_STAY_FROZEN

VIT = CLASSES['layers.attention.Attention']
SWIN = CLASSES['models.swin_transformer.WindowAttention']
SEVERAL = (
    'layers.attention.Attention',
    'models.beit.Attention',
    'models.eva.EvaAttention',
    'models.maxxvit.AttentionCl',
    'models.pvt_v2.Attention',
    'models.swin_transformer.WindowAttention',
)
several = pytest.mark.parametrize('name', first_of_each(SEVERAL))


@several
def test_classes_survive(name: str) -> None:
    family = CLASSES[name]
    model = family.create()
    classes = {module_name: type(module) for module_name, module in model.named_modules()}
    swap(model, input_size=family.input_size)
    for module_name, module in model.named_modules():
        assert isinstance(module, classes.get(module_name, type(module)))
    for record in sem_timm.patched_modules(model):
        assert type(model.get_submodule(record.name)).__mro__[1] is classes[record.name]


@several
def test_features_and_heads(name: str) -> None:
    family = CLASSES[name]
    model, images = swapped(family), family.images()
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        final, intermediates = model.forward_intermediates(images)
        assert torch.equal(final, features) and len(intermediates) > 1
        model.reset_classifier(7)
        assert model(images).shape == (2, 7)


def test_blocks_can_be_cut_off() -> None:
    model = swapped(VIT)
    model.prune_intermediate_layers([2], prune_head=False)
    assert len(model.blocks) == 3 == len(sem_timm.patched_modules(model))
    assert outputs(model, VIT.images())[0].shape == (2, 10)
    sem_timm.unpatch_model(model)
    assert not sem_timm.patched_modules(model)


@several
def test_new_parameters_are_grouped_with_their_blocks(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale_of = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    trained = {id(p) for p in sem_timm.trainable_parameters(model)}
    assert set(scale_of) == trained
    parameters = dict(model.named_parameters())
    for key, parameter in inserted(model).items():
        block = key.split('.core')[0]
        others = [p for n, p in parameters.items() if n.startswith(f'{block}.') and id(p) in scale_of]
        assert {scale_of[id(p)] for p in others} == {scale_of[id(parameter)]}


def test_optimizers_take_what_is_trained() -> None:
    model = swapped(SWIN)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    taken = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert taken == {id(p) for p in sem_timm.trainable_parameters(model)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backward(model, SWIN.images())
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert set(inserted(model)) <= moved and not any('relative_position' in key for key in moved)


def test_moving_averages() -> None:
    model = swapped(SWIN)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = {key: parameter.detach().clone() for key, parameter in inserted(model).items()}
    for parameter in inserted(model).values():
        nn.init.ones_(parameter)
    average.update(model)
    for key, parameter in inserted(average.module).items():
        torch.testing.assert_close(parameter, 0.5 * before[key] + 0.5)
    sem_timm.unpatch_model(average.module)
    assert sem_timm.patched_modules(model)


# Resizing after a swap


def test_a_vit_can_be_resized() -> None:
    model = swapped(Family('test_vit', options={'img_size': 64}))
    model.set_input_size((96, 64))
    assert shapes(model, torch.randn(2, 3, 96, 64)) == [(2, 10)]


@pytest.mark.filterwarnings('ignore::UserWarning')  # in timm's resampling of tables
@pytest.mark.parametrize('name', first_of_each(['swin_transformer', 'swin_transformer_v2', 'swin_transformer_v2_cr']))
@pytest.mark.parametrize('operation', ['external', 'catt'])
def test_a_swin_can_be_resized(name: str, operation: str) -> None:
    """Which of its blocks shift their windows, and so get a mask, changes with the size."""
    (key,) = [key for key in CLASSES if key.startswith(f'models.{name}.')]
    base, model = (CLASSES[key].create(strict_img_size=True) for _ in range(2))
    swap(model, operation)
    for size, window in (((128, 96), (4, 4)), ((64, 64), (8, 8)), ((96, 96), (6, 3))):
        for each in (base, model):
            each.set_input_size(img_size=size, window_size=window)
        images = torch.randn(1, 3, *size)
        assert shapes(model, images) == shapes(base, images)
    sem_timm.unpatch_model(model)
    assert_equal(outputs(model, images), outputs(base, images))


@pytest.mark.filterwarnings('ignore::UserWarning')  # in timm's resampling of tables
def test_what_is_useless_stays_so_when_a_swin_is_resized() -> None:
    """timm makes new tables of positions then; those that require gradients are not to be trained."""
    model = swap(SWIN.create(strict_img_size=True))
    model.set_input_size(img_size=(64, 64), window_size=(8, 8))
    backward(model, SWIN.images())
    useless = without_gradient(model)
    assert useless == set() or not TABLES_STAY_FROZEN
    assert all(name.endswith('.relative_position_bias_table') for name in useless)
    trained = set(map(id, sem_timm.trainable_parameters(model)))
    assert not any(id(model.get_parameter(name)) in trained for name in useless)


def test_dynamic_images() -> None:
    options = {'img_size': 64, 'dynamic_img_size': True, 'strict_img_size': False}
    model = swapped(Family('swin_tiny_patch4_window7_224', options={**SWIN.options, **options}))
    for size in ((64, 64), (96, 128), (40, 72)):
        assert shapes(model, torch.randn(1, 3, *size)) == [(1, 10)]


def test_other_channels_and_heads_of_the_model() -> None:
    family = CLASSES['layers.attention.Attention']
    model = swap(family.create(in_chans=1, num_classes=0))
    assert outputs(model, torch.randn(2, 1, 64, 64))[0].shape == (2, 64)


def test_patches_can_be_dropped() -> None:
    family = Family('test_vit', options={'img_size': 64, 'patch_drop_rate': 0.5})
    model = swapped(family).train()
    backward(model, family.images())
    assert without_gradient(model) == set()


@several
def test_features_only(name: str) -> None:
    family = CLASSES[name]
    base, model = (family.create(features_only=True, out_indices=(0, 1)) for _ in range(2))
    swap(model, input_size=family.input_size)
    assert shapes(model, family.images()) == shapes(base, family.images())
    assert model.feature_info.channels() == base.feature_info.channels()
