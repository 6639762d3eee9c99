"""Groups of parameters, as optimizers get them."""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters

import sem_timm
from sem_timm.compat import param_groups_layer_decay, param_groups_weight_decay
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, new_parameters


@capability('`group_matcher`')
def test_group_matcher(twins: Twins) -> None:
    for coarse in (False, True):
        expected = group_parameters(twins.base, twins.base.group_matcher(coarse=coarse), reverse=True)
        found = group_parameters(twins.model, twins.model.group_matcher(coarse=coarse), reverse=True)
        assert {name: group for name, group in found.items() if name in expected} == expected
        assert set(new_parameters(twins.model)) <= found.keys()


@capability('layer decay (`param_groups_layer_decay`)')
def test_layer_decay(twins: Twins) -> None:
    expected, found = scales(twins.base), scales(twins.model)
    assert {name: scale for name, scale in found.items() if name in expected} == {
        name: scale for name, scale in expected.items() if name in found
    }
    assert found.keys() - new_parameters(twins.model).keys() == {
        name for name in expected if twins.model.get_parameter(name).requires_grad
    }
    for part in sem_timm.patched_modules(twins.model):
        inside = {scale for name, scale in found.items() if name.startswith(f'{part.name}.')}
        assert len(inside) == 1, part.name


def scales(model: Any) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by."""
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    of = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


@capability('`no_weight_decay`')
def test_no_weight_decay(twins: Twins) -> None:
    assert twins.model.no_weight_decay() == twins.base.no_weight_decay()
    expected, found = decayed(twins.base), decayed(twins.model)
    new = new_parameters(twins.model)
    frozen = {name for name, p in twins.model.named_parameters() if not p.requires_grad}
    assert found - new.keys() == expected - frozen
    assert found & new.keys() == {name for name, p in new.items() if p.ndim > 1}


def decayed(model: Any) -> set[str]:
    """The parameters that get weight decay."""
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    of = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    return {name for name, p in model.named_parameters() if id(p) in of}
