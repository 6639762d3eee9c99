"""What torch offers for a model works for a patched one, with the same results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import sem_timm
from tests.thorough import first_of_each, thorough
from tests.twins import SEVERAL, assert_equal, both, inserted, several, trained
from tests.versions import free_batch


@pytest.mark.parametrize('name', first_of_each([*SEVERAL, 'dla', 'vgg', 'coat']))
def test_copy_and_pickle(name: str) -> None:
    base, model, family = both(name)
    trained(model)
    with torch.no_grad():
        expected = model(family.images())
        for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert sem_timm.patched_modules(other) == sem_timm.patched_modules(model)
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            assert_equal(expected, other(family.images()))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module):
            assert_equal(expected, twin(family.images()))
            assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
            sem_timm.unpatch_model(twin)
            assert_equal(base(family.images()), twin(family.images()))
            assert_equal(expected, model(family.images()))


@several
def test_compile_without_graph_breaks(name: str) -> None:
    _, model, family = both(name)
    compiled = torch.compile(trained(model), fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        assert_equal(model(family.images()), compiled(family.images()))


@thorough
@pytest.mark.parametrize(('name', 'block'), [('resnet', 'layer1.0'), ('vit_registers', 'blocks.0')])
def test_compile_with_inductor(name: str, block: str) -> None:
    _, model, _ = both(name)
    module = trained(model).get_submodule(block)
    x = torch.randn(2, *{'resnet': (32, 8, 8), 'vit_registers': (21, 64)}[name])
    with torch.no_grad():
        # Fusing operations rounds differently.
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-3, atol=1e-4)


@several
def test_export(name: str) -> None:
    _, model, family = both(name)
    model = trained(model).double()
    with torch.no_grad():
        exported = torch.export.export(
            model, (family.images().double(),), dynamic_shapes=({0: free_batch()},), strict=False
        ).module()
        for batch_size in (2, 5):
            # Gates are exported in operations that all know, such as ECA as a convolution of sequences, which round
            # differently.
            images = family.images(batch_size).double()
            torch.testing.assert_close(exported(images), model(images), rtol=1e-12, atol=1e-12)


@several
def test_autocast_and_half_precision(name: str) -> None:
    base, model, family = both(name)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert_equal(base(family.images()), model(family.images()))
    with torch.autocast('cpu', torch.bfloat16):
        trained(model).train()(family.images()).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in inserted(model).values())
    base, model, _ = both(name)
    with torch.no_grad():
        images = family.images().bfloat16()
        assert_equal(base.bfloat16()(images), model.bfloat16()(images))
    later = sem_timm.patch_model(base, input_size=family.input_size)
    assert {p.dtype for p in inserted(later).values()} == {torch.bfloat16}


@pytest.mark.parametrize('name', first_of_each(['resnet', 'efficientnet', 'convnext', 'regnet']))
def test_channels_last(name: str) -> None:
    base, model, family = both(name)
    for each in (base, model):
        each.to(memory_format=torch.channels_last)
    kept = []
    for module in sem_timm.patched_modules(model):
        gate = model.get_submodule(f'{module.name}.{module.inserted[0]}')
        gate.register_forward_hook(lambda gate, args, out: kept.append((args, out)))
    images = family.images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_equal(base(images), model(images))
    assert len(kept) == len(sem_timm.patched_modules(model))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for args, out in kept for t in (*args, out))


@several
def test_functional_call(name: str) -> None:
    base, model, family = both(name)
    weights = copy.deepcopy(trained(copy.deepcopy(model)).state_dict())
    with torch.no_grad():
        expected = torch.func.functional_call(model, weights, (family.images(),))
        assert not torch.equal(expected, model(family.images()))
        assert_equal(base(family.images()), model(family.images()))
        model.load_state_dict(weights)
        assert_equal(expected, model(family.images()))


def test_train_and_eval_reach_the_new_modules() -> None:
    _, model, _ = both('resnet')
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
    model.layer1.train()
    sem_timm.unpatch_model(model)
    sem_timm.patch_model(model)
    assert model.layer1[0].sem.training and not model.layer2[0].sem.training


@pytest.mark.filterwarnings('ignore::UserWarning')  # of ConvNeXt's gradient strides, without a patch too
@several
def test_distributed_training_needs_every_parameter(name: str, tmp_path: Any) -> None:
    """A wrapper without `find_unused_parameters` stops at the second step if a parameter got no gradient."""
    _, model, family = both(name, **({'drop_path_rate': 0.0} if name == 'swin' else {}))
    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD(wrapper.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            wrapper(family.images()).square().mean().backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    sem_timm.unpatch_model(wrapper.module)
    assert not sem_timm.patched_modules(wrapper)
