"""Models that cannot be operated on, and plans that do not fit them: an error with advice, and nothing has changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import fx, nn

import sem_timm
from sem_timm import ModelError, OptionError, PlanError
from tests.families import FAMILIES
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.versions import fully_shard


def resnet() -> Any:
    return FAMILIES['resnet'].create()


# Wrapped models


@pytest.fixture(scope='module')
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    store = tmp_path_factory.mktemp('store') / 'file'
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_wrapped(wrapper: nn.Module, model: nn.Module, *parts: str) -> None:
    """Every call refuses the wrapper with the advice in ``parts``, and neither wrapper nor model change."""
    for call in (sem_timm.plan_model, sem_timm.patch_model, sem_timm.unpatch_model):
        before = snapshot(model)
        with refused(wrapper, ModelError, *parts):
            call(wrapper)
        assert_same(before, snapshot(model))


def test_distributed_data_parallel(process_group: None) -> None:
    model = resnet()
    wrapper = nn.parallel.DistributedDataParallel(model)
    assert_wrapped(wrapper, model, 'DistributedDataParallel', 'patch_model(model.module)')


def test_data_parallel() -> None:
    model = resnet()
    assert_wrapped(nn.DataParallel(model), model, 'DataParallel', 'patch_model(model.module)')


def test_fully_sharded(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh = init_device_mesh('cpu', (1,))
    for call in (sem_timm.plan_model, sem_timm.patch_model):
        sharded = fully_shard(resnet(), mesh=mesh)
        with pytest.raises(ModelError, match=r'(?s)FSDP.*before fully_shard'):
            call(sharded)
        assert not sem_timm.patched_modules(sharded)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # one process makes it say that nothing is sharded
        wrapper = FullyShardedDataParallel(resnet(), device_id=torch.device('cpu'))
    with pytest.raises(ModelError, match=r'FullyShardedDataParallel.*before wrapping'):
        sem_timm.patch_model(wrapper)


def test_a_block_that_is_sharded(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model = resnet()
    fully_shard(model.layer1[0], mesh=init_device_mesh('cpu', (1,)))
    with pytest.raises(ModelError, match=r'(?s)layer1\.0.*FSDP.*fully_shard'):
        sem_timm.patch_model(model)
    assert not sem_timm.patched_modules(model)


def test_compiled() -> None:
    model = resnet()
    assert_wrapped(torch.compile(model), model, 'OptimizedModule', 'patch_model(model._orig_mod)')
    model.compile()
    assert_wrapped(model, model, 'compiled in place', 'patch', 'before', 'compile()')


def test_a_block_that_is_compiled() -> None:
    model = resnet()
    model.layer1[0].compile()
    with refused(model, ModelError, 'layer1.0', 'compiled'):
        sem_timm.patch_model(model)
    model = resnet()
    model.layer1[0] = torch.compile(model.layer1[0])
    with refused(model, ModelError, 'layer1.0', 'OptimizedModule', '_orig_mod'):
        sem_timm.patch_model(model)


def test_scripted() -> None:
    model = resnet()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch discourages both, and people use both
        scripted, traced = torch.jit.script(model), torch.jit.trace(model, FAMILIES['resnet'].images())
    for wrapper in (scripted, traced):
        for call in (sem_timm.plan_model, sem_timm.patch_model):
            with pytest.raises(ModelError, match=r'ScriptModule; patch the model before torch\.jit'):
                call(wrapper)


def test_traced_by_fx() -> None:
    model = fx.symbolic_trace(resnet())
    assert_wrapped(model, model, 'GraphModule', 'before it is traced by torch.fx')


def test_names_read_off_a_wrapped_model_are_understood() -> None:
    model = resnet()
    for prefix in ('module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'):
        assert [site.name for site in sem_timm.plan_model(model, target=[f'{prefix}layer1.0'])] == ['layer1.0']


# Plans that do not fit


def test_a_plan_for_another_model() -> None:
    model, other = resnet(), FAMILIES['convnext'].create()
    for wrong in (other, resnet(), copy.deepcopy(model)):
        plan = sem_timm.plan_model(model)
        with refused(wrong, PlanError, 'another ResNet', f'this {type(wrong).__name__}', 'plan_model(model'):
            sem_timm.patch_model(wrong, plan)
    del model, wrong
    with refused(other, PlanError, 'another ResNet', 'plan_model(model'):
        sem_timm.patch_model(other, plan)


def test_a_plan_with_options_beside_it() -> None:
    model = resnet()
    plan = sem_timm.plan_model(model)
    for options in ({'target': 'layer1.0'}, {'exclude': 'layer1.0'}, {'input_size': (3, 64, 64)}, {'reduction': 8}):
        with refused(model, OptionError, *options, 'given beside a plan', 'plan_model'):
            sem_timm.patch_model(model, plan, **options)
    with refused(model, OptionError, 'plan', 'patch_model'):
        sem_timm.plan_model(model, plan)


def replaced_by_another_class(model: Any) -> str:
    model.layer1[0] = Bottleneck(32, 8)
    return 'layer1.0'


def removed(model: Any) -> str:
    model.layer4 = nn.Identity()
    return 'layer4'


def patched_meanwhile(model: Any) -> str:
    sem_timm.patch_model(model, 'eca', target='layer2.0')
    return 'layer2.0'


def given_the_name_of_the_new_child(model: Any) -> str:
    model.layer2[0].sem = nn.Identity()
    return 'layer2.0'


@pytest.mark.parametrize(
    'change',
    [replaced_by_another_class, removed, patched_meanwhile, given_the_name_of_the_new_child],
)
def test_a_plan_for_a_model_that_has_changed(change: Callable[[nn.Module], str]) -> None:
    model = resnet()
    plan = sem_timm.plan_model(model)
    name = change(model)
    with refused(model, PlanError, 'changed since the plan was made', name, 'plan_model(model'):
        sem_timm.patch_model(model, plan)


def test_a_plan_for_a_model_whose_widths_have_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 8))
    plan = sem_timm.plan_model(model)
    model[0], model[1], model[2] = nn.Conv2d(3, 16, 3), BasicBlock(16, 16), BasicBlock(16, 16)
    with refused(model, PlanError, 'changed since the plan was made', '1', 'plan_model(model'):
        sem_timm.patch_model(model, plan)


def test_a_plan_may_be_applied_again_after_undoing_it() -> None:
    model = resnet()
    plan = sem_timm.plan_model(model)
    sem_timm.patch_model(model, plan)
    with refused(model, PlanError, 'changed since the plan was made'):
        sem_timm.patch_model(model, plan)
    sem_timm.unpatch_model(model)
    assert len(sem_timm.patched_modules(sem_timm.patch_model(model, plan))) == len(plan)


def test_a_plan_has_no_code_for_what_is_not_its_site() -> None:
    plan = sem_timm.plan_model(resnet())
    with pytest.raises(OptionError, match=r"'layer9\.0' is not a site of this plan.*layer1\.0"):
        plan.code('layer9.0')
