"""What an optimizer is given, before a model is patched and after."""

from __future__ import annotations

import torch

import sem_timm
from tests.families import FAMILIES
from tests.twins import inserted


def test_an_optimizer_from_before_the_patch_is_given_what_it_lacks() -> None:
    model = FAMILIES['resnet'].create()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sem_timm.patch_model(model)
    lacking = list(sem_timm.trainable_parameters(model, not_in=optimizer))
    assert {id(p) for p in lacking} == {id(p) for p in inserted(model).values()}
    optimizer.add_param_group({'params': lacking})
    assert not list(sem_timm.trainable_parameters(model, not_in=optimizer))
    before = {name: parameter.clone() for name, parameter in inserted(model).items()}
    model.train()(FAMILIES['resnet'].images()).square().mean().backward()
    optimizer.step()
    moved = [name for name, parameter in inserted(model).items() if not torch.equal(parameter, before[name])]
    assert {name.partition('.sem.')[0] for name in moved} == {part.name for part in sem_timm.patched_modules(model)}


def test_all_are_told_without_an_optimizer() -> None:
    model = sem_timm.patch_model(FAMILIES['resnet'].create())
    assert [id(p) for p in sem_timm.trainable_parameters(model)] == [id(p) for p in model.parameters()]
