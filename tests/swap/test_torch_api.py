"""What torch offers for a model works for a swapped one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sem_timm
from tests.families import Family
from tests.swap.classes import CLASSES
from tests.swap.swapping import backward, outputs, swap, swapped, tensors, without_gradient
from tests.thorough import first_of_each
from tests.twins import assert_equal, inserted
from tests.versions import free_batch

FIVE = (
    'layers.attention.Attention',
    'models.eva.EvaAttention',
    'models.maxxvit.AttentionCl',
    'models.pvt_v2.Attention',
    'models.swin_transformer.WindowAttention',
)
SHORT: dict[str, dict[str, Any]] = {
    'layers.attention.Attention': {'depth': 2},
    'models.swin_transformer.WindowAttention': {'depths': (2, 1), 'num_heads': (3, 6)},
}
Call = tuple[tuple[Any, ...], dict[str, Any]]
five = pytest.mark.parametrize('name', first_of_each(FIVE))


# A block of each, which compiles faster than the model.
BLOCKS = {
    'layers.attention.Attention': 'blocks.0',
    'layers.attention2d.MultiQueryAttention2d': 'blocks.2.4',
    'models.eva.EvaAttention': 'blocks.1',
    'models.maxxvit.AttentionCl': 'stages.1.blocks.0',
    'models.mvitv2.MultiScaleAttention': 'stages.1.blocks.0',
    'models.pvt_v2.Attention': 'stages.0.blocks.0',
    'models.swin_transformer.WindowAttention': 'layers.0.blocks.1',
}


def block_of(name: str, operation: str = 'external') -> tuple[nn.Module, Call]:
    """A block with a swapped attention, and what the model calls it with."""
    family = CLASSES[name]
    model = swapped(family, operation)
    block = model.get_submodule(BLOCKS[name])
    calls: list[Call] = []
    hook = block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    outputs(model, family.images())
    hook.remove()
    return block, calls[0]


def assert_compiles(block: nn.Module, call: Call) -> None:
    args, kwargs = call
    with torch.no_grad():
        expected = tensors(block(*args, **kwargs))
        found = tensors(torch.compile(block, fullgraph=True, backend='aot_eager')(*args, **kwargs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', first_of_each(BLOCKS))
def test_compile_without_graph_breaks(name: str) -> None:
    assert_compiles(*block_of(name))


@pytest.mark.parametrize('operation', ['eamlp', 'efficient', 'linear', 'halo', 'monarch', 'catt', 'caam'])
def test_compile_other_attentions(operation: str) -> None:
    assert_compiles(*block_of('layers.attention.Attention', operation))


@pytest.mark.parametrize(
    'name', first_of_each(['layers.attention.Attention', 'models.swin_transformer.WindowAttention'])
)
def test_compile_whole_models(name: str) -> None:
    family = CLASSES[name]
    model, images = swapped(family, create=SHORT[name]), family.images()
    with torch.no_grad():
        found = tensors(torch.compile(model, fullgraph=True, backend='eager')(images))
    torch.testing.assert_close(found, outputs(model, images), rtol=1e-4, atol=1e-5)


def test_compile_for_training() -> None:
    family = CLASSES['layers.attention.Attention']
    model, images = swapped(family, create={'depth': 1}), family.images()
    twin = copy.deepcopy(model)
    backward(model, images)
    backward(torch.compile(twin, fullgraph=True, backend='aot_eager'), images)
    for (key, one), (_, other) in zip(inserted(model).items(), inserted(twin).items()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=key)
    assert without_gradient(twin) == set()


@five
def test_export(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family, create=SHORT.get(name))
    with torch.no_grad():
        exported = torch.export.export(
            model, (family.images(),), dynamic_shapes=({0: free_batch()},), strict=False
        ).module()
        for batch_size in (2, 5):
            images = family.images(batch_size)
            torch.testing.assert_close(tensors(exported(images)), outputs(model, images), rtol=1e-4, atol=1e-5)


@five
def test_autocast(name: str) -> None:
    family = CLASSES[name]
    model, images = swapped(family), family.images()
    with torch.autocast('cpu', torch.bfloat16):
        found = outputs(model, images)
    with torch.autocast('cpu', torch.bfloat16):  # anew: torch 2.9 remembers weights that were cast without gradients
        backward(model, images)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in inserted(model).values())
    assert without_gradient(model) == set()
    for full, half in zip(outputs(model, images), found):
        # The precision of bfloat16 through a whole network.
        assert (full - half.float()).norm() < 0.1 * full.norm()


@five
def test_half_precision(name: str) -> None:
    family = CLASSES[name]
    before = swapped(family).bfloat16()
    after = swapped(family, create=None)
    later = swap(family.create().bfloat16(), input_size=family.input_size)
    for model in (before, later):
        assert {p.dtype for p in inserted(model).values()} == {torch.bfloat16}
        (found,) = outputs(model, family.images().bfloat16())
        assert found.dtype == torch.bfloat16 and found.isfinite().all()
    full = after(family.images())
    assert (full - before(family.images().bfloat16()).float()).norm() < 0.5 * full.norm()


def test_double_precision() -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']
    model = swapped(family)
    (expected,) = outputs(model, family.images())
    (found,) = outputs(model.double(), family.images().double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


@five
def test_channels_last(name: str) -> None:
    family = CLASSES[name]
    model = swapped(family)
    expected = outputs(model, family.images())
    model.to(memory_format=torch.channels_last)
    found = outputs(model, family.images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_functional_call_and_state_dicts() -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']
    model, other = swapped(family), swapped(family)
    generator = torch.Generator().manual_seed(5)
    for parameter in inserted(model).values():
        nn.init.normal_(parameter, generator=generator)
    weights, images = copy.deepcopy(model.state_dict()), family.images()
    with torch.no_grad():
        expected = tensors(torch.func.functional_call(other, weights, (images,)))
    assert not torch.equal(expected[0], outputs(other, images)[0])
    assert_equal(expected, outputs(model, images))
    other.load_state_dict(weights)
    assert_equal(expected, outputs(other, images))
    base = family.create()
    base.load_state_dict({key: value for key, value in weights.items() if '.core.' not in key})


def test_the_modes_of_a_model_reach_its_new_cores() -> None:
    family = CLASSES['layers.attention.Attention']
    model = family.create().train()
    model.blocks[1].eval()
    swap(model, 'eamlp')
    assert model.blocks[0].attn.core.training and not model.blocks[1].attn.core.training
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}


def test_swapping_where_no_gradients_are_kept() -> None:
    family = CLASSES['layers.attention.Attention']
    for context in (torch.no_grad, torch.inference_mode):
        model = family.create()
        with context():
            swap(model)
            expected = outputs(model, family.images())
        backward(model, family.images())
        assert without_gradient(model) == set()
        assert_equal(expected, outputs(model, family.images()))


@pytest.mark.filterwarnings('ignore::UserWarning')  # of torch about its own profiler and hooks
def test_checkpointed_blocks_have_the_same_gradients() -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']
    model, other = swapped(family, create={'drop_path_rate': 0.0}), None
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        backward(each.train(), family.images())
    for one, two in zip(inserted(model).values(), inserted(other).values()):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_wrapped_model_is_refused_with_the_way_out() -> None:
    family: Family = CLASSES['layers.attention.Attention']
    wrapped: Any = nn.DataParallel(family.create())
    with pytest.raises(sem_timm.ModelError, match=r'patch_model\(model\.module\)'):
        sem_timm.patch_model(wrapped, 'external')
