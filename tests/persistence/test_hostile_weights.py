"""A safetensors file that is not what patch.json says: an error that names it, and an unchanged model."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import sem_timm
from sem_timm import PatchFileError
from tests.persistence.patches import base, edit_json, of_case, outputs, swap_in, weights_file
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sem_timm.save_patch(of_case('sem'), tmp_path)


def with_header(header: Any, tail: bytes = b'', length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + tail


F32: dict[str, Any] = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}

FILES: dict[str, bytes] = {
    'empty': b' ',
    'pickle': pickle.dumps({'weight': [1.0]}),
    'zip': b'PK\x03\x04' + bytes(100),
    'huge_header': with_header(b'{}', length=2**63),
    'header_beyond_the_end': with_header(b'{}', length=1000),
    'header_that_is_no_json': with_header(b'__import__("os")'),
    'header_that_is_a_list': with_header([]),
    'no_tensors': with_header({}),
    'unknown_dtype': with_header({'a': {**F32, 'dtype': 'PICKLE'}}, bytes(8)),
    'offsets_beyond_the_end': with_header({'a': {**F32, 'data_offsets': [0, 2**60]}}, bytes(8)),
    'negative_offsets': with_header({'a': {**F32, 'data_offsets': [-8, 0]}}, bytes(8)),
    'huge_shape': with_header({'a': {**F32, 'shape': [2**62, 2**62]}}, bytes(8)),
    'shape_that_does_not_fit': with_header({'a': {**F32, 'shape': [3]}}, bytes(8)),
    'overlapping': with_header({'a': F32, 'b': F32}, bytes(8)),
    'hole': with_header({'a': F32}, bytes(64)),
    'duplicate': with_header(b'{"a": %b, "a": %b}' % (2 * (json.dumps(F32).encode(),)), bytes(8)),
    'nested': with_header(b'[' * 100_000),
    'metadata_that_is_code': with_header({'__metadata__': {'a': {'b': 1}}}, bytes(8)),
}


@pytest.mark.parametrize('case', FILES)
def test_files(folder: Path, case: str) -> None:
    swap_in(folder, FILES[case])
    with refused(model := base(), PatchFileError, str(weights_file(folder))):
        sem_timm.load_patch(model, folder)


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


NAME = 'layer2.0.sem.decision.weight'

TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    'missing': (lambda t: t.pop(NAME), ('lacks the tensor', NAME)),
    'extra': (lambda t: t.update(more=torch.ones(1)), ("has the tensor 'more'", 'tensors')),
    'renamed': (lambda t: renamed(t, NAME, '../../etc/passwd'), ('lacks the tensor', NAME)),
    'reshaped': (
        lambda t: t.update({NAME: t[NAME].T.contiguous()}),
        (f'tensors.{NAME} says', '(3, 48)', '(48, 3)'),
    ),
    'cast': (lambda t: t.update({NAME: t[NAME].half()}), (f'tensors.{NAME} says float32', 'float16')),
}


@pytest.mark.parametrize('case', TENSORS)
def test_tensors_that_the_record_does_not_tell(folder: Path, case: str) -> None:
    edit, parts = TENSORS[case]
    tensors = safetensors.torch.load_file(weights_file(folder))
    edit(tensors)
    swap_in(folder, safetensors.torch.save(tensors))
    with refused(model := base(), PatchFileError, str(weights_file(folder)), *parts):
        sem_timm.load_patch(model, folder)


GATE = 'layer1.0.sem.gain'

AGREED: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    'missing': (lambda t: t.pop(NAME), ('operations[0]', 'fewer values')),
    'missing_state': (lambda t: t.pop(GATE), (f"tensors: '{GATE}' is missing",)),
    'extra': (lambda t: t.update({f'{NAME}s': torch.ones(1)}), (f'tensors.{NAME}s: no tensor of the model', NAME)),
    'reshaped': (lambda t: t.update({NAME: t[NAME].T.contiguous()}), (f'tensors.{NAME}.shape: (48, 3)', '(3, 48)')),
    'of_integers': (lambda t: t.update({NAME: t[NAME].long()}), (f'tensors.{NAME}.dtype: torch.int64', 'float32')),
    'of_the_base': (
        lambda t: t.update({'bn1.weight': torch.ones(24)}),
        ('tensors.bn1.weight.part: the model has it in base',),
    ),
    'gain_that_no_gate_has': (lambda t: t.update({GATE: torch.tensor(5.0)}), ('cannot be loaded', 'gain of 5.0')),
    'gain_that_is_no_number': (lambda t: t.update({GATE: torch.tensor(float('nan'))}), ('gain of nan',)),
    'gain_of_another_shape': (lambda t: t.update({GATE: torch.ones(3)}), (f'tensors.{GATE}.shape: (3,)',)),
}


@pytest.mark.parametrize('case', AGREED)
def test_tensors_that_the_model_does_not_have(folder: Path, case: str) -> None:
    """The record agrees with the file, and both disagree with the model."""
    edit, parts = AGREED[case]
    tensors = safetensors.torch.load_file(weights_file(folder))
    edit(tensors)
    swap_in(folder, safetensors.torch.save(tensors))
    said = {
        name: {'part': 'new', 'dtype': str(t.dtype).removeprefix('torch.'), 'shape': list(t.shape)}
        for name, t in tensors.items()
    }
    edit_json(folder, lambda data: data.update(tensors=said))
    with refused(model := base(), PatchFileError, str(folder / 'patch.json'), *parts):
        sem_timm.load_patch(model, folder)


def test_damage_is_noticed(folder: Path) -> None:
    file = weights_file(folder)
    whole = file.read_bytes()
    cases: list[tuple[bytes, str]] = [
        (whole[:-1], 'was cut off or changed: it has 38,335 of the 38,336 bytes'),
        (whole[:10], 'was cut off'),
        (b'', 'was cut off'),
        (whole + b'\0', 'more than the 38,336 bytes'),
        (whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], 'was changed or damaged'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 38336\n', 'git lfs pull'),
    ]
    for data, part in cases:
        file.write_bytes(data)
        with refused(model := base(), PatchFileError, str(file), part):
            sem_timm.load_patch(model, folder)
    file.unlink()
    with refused(model := base(), PatchFileError, str(file), 'which patch.json names, cannot be read'):
        sem_timm.load_patch(model, folder)
    file.write_bytes(whole)
    assert torch.equal(outputs(sem_timm.load_patch(base(), folder)), outputs(of_case('sem')))


def test_models_that_a_patch_is_not_for(folder: Path) -> None:
    cases: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
        (base('vit_registers'), PatchFileError, ('base.architecture', "'test_resnet'", "'test_vit'")),
        (base().to('meta'), sem_timm.ModelError, ('meta device',)),
        (torch.nn.DataParallel(base()), sem_timm.ModelError, ('DataParallel', '.module')),
        (torch.compile(base()), sem_timm.ModelError, ('OptimizedModule', '_orig_mod')),
        (
            of_case('timm_cbam'),
            sem_timm.ModelError,
            ('patched already', 'cbam at 4 sites here', 'unpatch_model'),
        ),
        (of_case('sem_with_options'), sem_timm.ModelError, ('patched already', 'unpatch_model')),
    ]
    for model, error, parts in cases:
        with refused(model, error, *parts):
            sem_timm.load_patch(model, folder)
    with pytest.raises(sem_timm.ModelError, match='not dict'):
        sem_timm.load_patch({}, folder)  # type: ignore[arg-type]


def test_a_model_of_the_same_name_with_other_blocks(folder: Path) -> None:
    deeper = base(layers=(1, 1, 1, 2))
    sem_timm.load_patch(deeper, folder, check_base='ignore')  # it has all the sites, and one block more
    narrow = base(channels=(16, 48, 48, 96))
    with refused(narrow, PatchFileError, 'operations[0].sites[0]', 'layer1.0 has 16', '32 in the patch'):
        sem_timm.load_patch(narrow, folder)


def test_failure_in_a_later_operation_undoes_the_earlier_ones(tmp_path: Path) -> None:
    sem_timm.save_patch(of_case('two_attentions_and_sem'), tmp_path)

    def break_last(data: Any) -> None:
        data['operations'][-1]['sites'][-1]['widths']['channels'] = 65

    edit_json(tmp_path, break_last)
    model = base('vit_registers')
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
        parameter.requires_grad_(number % 3 > 0)
    with refused(model, PatchFileError, 'operations[2].sites[2].channels'):
        sem_timm.load_patch(model, tmp_path)
