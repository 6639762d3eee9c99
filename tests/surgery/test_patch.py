"""All of a plan or nothing: what a failure half way leaves, and edits of modules that had one before."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn

import sem_timm
from sem_timm.random_state import preserved_random_state, random_states
from sem_timm.surgery.rewrite import Edit, Note, edit_of, note_of, put_back, put_in
from tests.families import FAMILIES
from tests.refusals import refused


class Drawn(nn.Identity):
    """A module that draws from every generator, and cannot be built a third time."""

    built = 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        if torch.empty(0).device.type != 'meta':
            torch.rand(3), random.random(), numpy.random.rand()
            Drawn.built += 1
            if Drawn.built == 3:
                raise MemoryError('no room for a third')


def test_all_random_generators_are_put_back_when_a_plan_fails_half_way() -> None:
    model = FAMILIES['resnet'].create()
    plan = sem_timm.plan_model(model, Drawn)
    Drawn.built, before = 0, random_states()
    with refused(model, MemoryError, 'a third'):
        sem_timm.patch_model(model, plan)
    assert random_states() == before and Drawn.built == 3


def test_new_modules_draw_from_the_random_generators_where_all_goes_well() -> None:
    model = FAMILIES['resnet'].create()
    plan = sem_timm.plan_model(model, Drawn, target='layer1.0')
    Drawn.built, before = 0, random_states()
    sem_timm.patch_model(model, plan)
    assert all(one != other for one, other in zip(random_states()[:2], before))


@pytest.mark.parametrize('after_success', [False, True])
def test_random_states_may_be_put_back_after_errors_only(after_success: bool) -> None:
    before = random_states()
    with preserved_random_state(after_success=after_success):
        torch.rand(3), random.random(), numpy.random.rand()
    assert (random_states() == before) == after_success


def edit(base: type, *inserted: str) -> Edit:
    source = f'def forward(self, x):\n    return {base.__name__}.forward(self, x) + 1\n'
    return Edit(base, source, ((base.__name__, base),), inserted, 'output', 'adds one')


def test_edits_are_taken_back_one_by_one_with_their_children_and_notes() -> None:
    module = nn.Identity()
    before = dict(module.__dict__)
    first = edit(nn.Identity, 'first')
    module.add_module('first', nn.Identity())
    put_in(module, first, Note(0, (3, 8, 8), ()))
    second = edit(type(module), 'second')
    module.add_module('second', nn.Identity())
    put_in(module, second, Note(1, (3, 8, 8), ()))
    assert module(torch.zeros(())) == 2 and note_of(module).number == 1
    put_back(module, second)
    assert module(torch.zeros(())) == 1 and note_of(module).number == 0
    assert edit_of(module) == first and list(module._modules) == ['first']
    put_back(module, first)
    assert type(module) is nn.Identity and module.__dict__ == before and not module._modules


def test_of_an_edit_that_is_not_in_force_yet_the_children_go() -> None:
    module = nn.Identity()
    first = edit(nn.Identity, 'first')
    put_in(module, first, Note(0, (3, 8, 8), ()))
    module.add_module('second', nn.Identity())
    put_back(module, edit(type(module), 'second', 'third'))
    assert not module._modules and edit_of(module) == first and note_of(module).number == 0
