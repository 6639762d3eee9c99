"""The base under a patch: recognised by its weights, and what of it may be saved with the patch."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sem_timm
from sem_timm import BaseWeightsWarning, OptionError, PatchFileError
from sem_timm.persistence.fingerprint import fingerprint
from tests.persistence.patches import base, edit_json, of_case, outputs, patch
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sem_timm.save_patch(of_case('sem'), tmp_path / 'saved')


def other_base() -> Any:
    model = base()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 1, 0, 2] += 1e-6
    return model


def test_other_base_weights_warn_or_fail_or_pass(folder: Path) -> None:
    # The weights here are random: timm tells a tag all the same.
    base_name = "(test_resnet, of the tag 'r160_in1k' if its weights were loaded)"
    parts = ('patch.json: fingerprints', base_name, '1 of ', 'layer2.0.conv1.weight has other values')
    model = other_base()
    with refused(model, PatchFileError, *parts):
        sem_timm.load_patch(model, folder, check_base='error')
    with refused(model, BaseWeightsWarning, *parts):  # where warnings are errors, this one leaves the model alone too
        sem_timm.load_patch(model, folder)
    with pytest.warns(BaseWeightsWarning) as caught:
        sem_timm.load_patch(model, folder)
    assert caught[0].filename == __file__
    assert sem_timm.patched_modules(model)
    assert sem_timm.patched_modules(sem_timm.load_patch(other_base(), folder, check_base='ignore'))
    with refused(model, OptionError, "check_base='maybe'", "'warn', 'error', 'ignore'"):
        sem_timm.load_patch(model, folder, check_base='maybe')


def test_statistics_of_norms_are_base_weights_and_counters_are_not(folder: Path) -> None:
    model = base()
    model.bn1.num_batches_tracked += 100
    sem_timm.load_patch(copy.deepcopy(model), folder, check_base='error')
    model.bn1.running_mean += 1
    with refused(model, PatchFileError, '1 of ', 'bn1.running_mean has other values'):
        sem_timm.load_patch(model, folder, check_base='error')


def test_patching_and_layout_do_not_change_the_base(folder: Path) -> None:
    model = base().to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sem_timm.load_patch(model, folder, check_base='error')
    assert {name: fingerprint(t) for name, t in base().state_dict().items()} == {
        name: fingerprint(t) for name, t in sem_timm.unpatch_model(model).state_dict().items()
    }


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_base_is_the_same_base(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, images = of_case('sem'), None
    sem_timm.save_patch(saved, tmp_path / 'single')
    model = sem_timm.load_patch(base().to(dtype), tmp_path / 'single', check_base='error')
    expected = copy.deepcopy(saved).to(dtype)
    assert images is None and torch.equal(outputs(model), outputs(expected))
    assert {p.dtype for p in model.parameters()} == {dtype}
    sem_timm.save_patch(expected, tmp_path / 'cast')  # and a patch of a cast model fits the model before the cast
    sem_timm.load_patch(base(), tmp_path / 'cast', check_base='error')


def test_a_base_that_was_rounded_is_said_to_be(folder: Path) -> None:
    model = base().to(torch.bfloat16).float()
    with refused(model, PatchFileError, 'was rounded to bfloat16'):
        sem_timm.load_patch(model, folder, check_base='error')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_fingerprints_are_of_values_in_logical_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    strided = torch.empty(4, 3, 2, dtype=dtype).permute(2, 1, 0).copy_(tensor)
    assert strided.stride() != tensor.stride() and fingerprint(strided) == fingerprint(tensor)
    assert fingerprint(tensor).compare(strided) is None
    for other in (tensor.flip(0), tensor.view(3, 2, 4), tensor[:1]):
        assert fingerprint(other) != fingerprint(tensor) and fingerprint(tensor).compare(other) is not None
    assert fingerprint(torch.ones(())).compare(torch.ones(())) is None
    assert fingerprint(torch.empty(0, 3)).compare(torch.empty(0, 3)) is None
    half = fingerprint(torch.ones(2, dtype=torch.float16))
    assert 'no exact cast' in str(half.compare(torch.ones(2, dtype=torch.bfloat16)))


def trained_base() -> tuple[Any, Any]:
    """A model and what a step of training makes of it, base, norms and head included."""
    before, torch_state = base(num_classes=7), torch.get_rng_state()
    model = patch(copy.deepcopy(before)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))).square().mean().backward()
    optimizer.step()
    torch.set_rng_state(torch_state)
    return before, model


def test_changed_base_weights_and_head_come_along_on_request(tmp_path: Path) -> None:
    before, model = trained_base()
    sem_timm.save_patch(model, tmp_path, include_head=True, base=before, include_changed_base=True)
    other = base(num_classes=7)
    nn.init.normal_(other.fc.weight)  # fresh, and not what is compared
    sem_timm.load_patch(other, tmp_path, check_base='error')
    assert torch.equal(outputs(other), outputs(model))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_changed_base_weights_are_noticed_when_they_are_left_out(tmp_path: Path) -> None:
    before, model = trained_base()
    for given in (before, before.state_dict(), nn.DataParallel(before)):
        with refused(model, OptionError, 'base tensors have changed', 'conv1', 'include_changed_base=True'):
            sem_timm.save_patch(model, tmp_path, base=given)
    with refused(model, OptionError, 'include_changed_base=True needs base='):
        sem_timm.save_patch(model, tmp_path, include_changed_base=True)
    with refused(model, OptionError, "base='weights.pth' is no model and no state_dict"):
        sem_timm.save_patch(model, tmp_path, base='weights.pth')  # type: ignore[arg-type]
    with refused(model, OptionError, 'not the base of this model', 'it has none'):
        sem_timm.save_patch(model, tmp_path, base={})
    with refused(model, OptionError, 'meta device'):
        sem_timm.save_patch(model, tmp_path, base=copy.deepcopy(before).to('meta'))
    assert not list(tmp_path.iterdir())
    sem_timm.save_patch(model, tmp_path)  # a patch for the weights as they are now
    with refused(before, PatchFileError, 'has other values'):
        sem_timm.load_patch(before, tmp_path, check_base='error')


def test_frozen_base_needs_no_weights_of_it(tmp_path: Path) -> None:
    before = base()
    sem_timm.save_patch(patch(copy.deepcopy(before)), tmp_path, base=before, include_changed_base=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sem_timm.load_patch(before, tmp_path)


@pytest.mark.parametrize('name', ['resnet', 'convnext', 'deit_distilled', 'regnet', 'vit_registers'])
def test_head_is_what_timm_calls_the_classifier(tmp_path: Path, name: str) -> None:
    model = patch(base(name, num_classes=3), ('sem', {}))
    sem_timm.save_patch(model, tmp_path, include_head=True)
    other = base(name, num_classes=3)
    other.reset_classifier(3)
    sem_timm.load_patch(other, tmp_path, check_base='error')
    assert torch.equal(outputs(other, name), outputs(model, name))
    wider = base(name, num_classes=5)
    with refused(wider, PatchFileError, 'tensors.', '.shape: (3', '(5', 'reset_classifier'):
        sem_timm.load_patch(wider, tmp_path)


def test_fingerprints_of_other_tensors_than_the_model_has(folder: Path) -> None:
    def rename(data: Any) -> None:
        data['fingerprints']['stem.weight'] = data['fingerprints'].pop('conv1.0.weight')

    edit_json(folder, rename)
    with refused(model := base(), PatchFileError, '2 of ', 'stem.weight is not there'):
        sem_timm.load_patch(model, folder, check_base='error')


def moved_norms(model: Any) -> Any:
    """A model whose base is frozen, and whose norms saw images in training mode."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)))
    return model.eval()


def test_statistics_that_moved_under_a_frozen_base_come_along(tmp_path: Path) -> None:
    before = base()
    model = moved_norms(patch(copy.deepcopy(before)))
    for number, options in enumerate(({}, {'base': before})):
        sem_timm.save_patch(model, tmp_path / str(number), **options)
        loaded = sem_timm.load_patch(base(), tmp_path / str(number), check_base='error')
        assert torch.equal(outputs(loaded), outputs(model))
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
        sem_timm.save_patch(loaded, tmp_path / 'again')  # saved again they are still not those of the base
        assert torch.equal(outputs(sem_timm.load_patch(base(), tmp_path / 'again')), outputs(model))
    assert not torch.equal(outputs(patch(before)), outputs(model))


def test_statistics_that_did_not_move_stay_out(tmp_path: Path) -> None:
    models = [patch(base()), patch(base()).half(), patch(base('vit_registers'))]
    moved = sem_timm.unpatch_model(moved_norms(patch(base())))
    models.append(patch(moved))  # after undoing, they are those of a base
    for number, model in enumerate(models):
        sem_timm.save_patch(model, tmp_path / str(number))
        record = json.loads((tmp_path / str(number) / 'patch.json').read_text())
        assert {tensor['part'] for tensor in record['tensors'].values()} == {'new'}


def test_statistics_are_those_before_the_first_patch(tmp_path: Path) -> None:
    model = moved_norms(patch(base(), ('sem', {'target': 'layer1.0'})))
    patch(model, ('sem', {'target': 'layer2.0'}))
    sem_timm.save_patch(model, tmp_path)
    assert torch.equal(outputs(sem_timm.load_patch(base(), tmp_path, check_base='error')), outputs(model))
