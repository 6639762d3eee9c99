"""Patch files that version 0.1.0 wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import sem_timm
from tests.persistence.patches import CASES, base, edit_json, of_case, outputs, swap_in, weights_file


@pytest.mark.parametrize('case', ['sem', 'sem_with_options', 'eca'])
def test_gains_under_their_former_name(tmp_path: Path, case: str) -> None:
    """It has the gains of its gates under the name that torch has for what is no tensor."""
    sem_timm.save_patch(of_case(case), tmp_path)

    def former(named: dict[str, Any]) -> dict[str, Any]:
        return {re.sub(r'\bgain$', '_extra_state', name): value for name, value in named.items()}

    tensors = former(safetensors.torch.load_file(weights_file(tmp_path)))
    assert any(name.endswith('_extra_state') for name in tensors)
    swap_in(tmp_path, safetensors.torch.save(tensors))
    edit_json(tmp_path, lambda data: data.update(tensors=former(data['tensors'])))
    family = CASES[case][0]
    loaded = sem_timm.load_patch(base(family), tmp_path, check_base='error')
    assert torch.equal(outputs(loaded, family), outputs(of_case(case), family))
