"""A patch.json that anybody may have written: an error that names file and field, and an unchanged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sem_timm
from sem_timm import PatchFileError
from tests.persistence.patches import base, edit_json, of_case
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = sem_timm.save_patch(of_case('sem'), tmp_path_factory.mktemp('saved'))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, saved: dict[str, bytes]) -> Path:
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def at(*path: Any) -> tuple[Any, ...]:
    return path


CODE = '__import__("os").system("touch pwned")'
SITE = at('operations', 0, 'sites', 0)
OPTIONS = at('operations', 0, 'options')
TENSOR = at('tensors', 'layer1.0.sem.decision.weight')
PRINT = at('fingerprints', 'conv1.0.weight')

# Where, what is put there, and what the message must say beside the path of the file.
VALUES: list[tuple[tuple[Any, ...], Any, tuple[str, ...]]] = [
    (at('format_version'), 2, ('format_version: 2 is newer than 1', 'pip install --upgrade sem_timm')),
    (at('format_version'), 0, ('format_version: 0 is out of range',)),
    (at('format_version'), True, ('format_version: an integer is needed, not True',)),
    (at('format_version'), '1', ("format_version: an integer is needed, not '1'",)),
    (at('execute'), CODE, ("field 'execute' is unknown",)),
    (at('versions'), [], ('versions: an object', 'not []')),
    (at('versions', 'torch'), None, ('versions.torch: a text is needed, not None',)),
    (at('base', 'architecture'), 'resnet50', ('base.architecture', "'resnet50'", "'test_resnet'", 'create_model')),
    (at('base', 'architecture'), CODE, ('base.architecture', 'test_resnet')),
    (at('base', 'tag'), {}, ('base.tag: a text is needed',)),
    (at('operations'), [], ('operations: is empty',)),
    (at('operations'), {}, ('operations: a list',)),
    (at('operations', 0, 'operation'), 'os.system', ("operations[0].operation: 'os.system' is unknown",)),
    (at('operations', 0, 'operation'), 'InsertConfig', ('is unknown', 'sem')),
    (at('operations', 0, 'operation'), 'attention', ('operations[0].options', "'attention'")),
    (OPTIONS, [], ('operations[0].options: an object',)),
    ((*OPTIONS, 'factory'), CODE, ("operations[0].options: field 'factory' is unknown",)),
    ((*OPTIONS, '__class__'), 'builtins.object', ("field '__class__' is unknown",)),
    ((*OPTIONS, 'reduction'), 10**15, ('options.reduction: 1000000000000000 is out of range',)),
    ((*OPTIONS, 'reduction'), 0, ('options.reduction: 0 is out of range',)),
    ((*OPTIONS, 'reduction'), 4.0, ('options.reduction: an integer is needed',)),
    ((*OPTIONS, 'operators'), 'se', ('options.operators: a list',)),
    ((*OPTIONS, 'operators'), [], ('options: operators is empty',)),
    ((*OPTIONS, 'operators'), ['se'] * 100_000, ('options.operators: a list of 100000 entries',)),
    ((*OPTIONS, 'operators'), ['os.system'], ("options: excitation operator 'os.system' is unknown",)),
    ((*OPTIONS, 'operators'), [CODE], ('is unknown',)),
    ((*OPTIONS, 'operators'), [None], ('options.operators[0]: a text is needed',)),
    ((*OPTIONS, 'init'), 'x' * 100_000, ('options.init: a text of 100000 characters',)),
    ((*OPTIONS, 'init'), 'zero', ("options: init='zero'",)),
    ((*OPTIONS, 'position'), 'core', ("options: position='core'",)),
    ((*OPTIONS, 'reduction'), {'a': 1}, ('options.reduction',)),
    ((*OPTIONS, 'reduction'), 8, ('sites[1].num_parameters', 'layer2.0')),
    ((*OPTIONS, 'operators'), ['se'], ('sites[0].num_parameters', 'layer1.0')),
    (at('operations', 0, 'input_size'), [3, 10**9, 10**9], ('input_size[1]', 'out of range')),
    (at('operations', 0, 'input_size'), 224, ('input_size: a list',)),
    (at('operations', 0, 'sites'), [], ('operations[0].sites: is empty',)),
    ((*SITE, 'name'), '../../etc/passwd', ("sites[0].name: '../../etc/passwd' is no module",)),
    ((*SITE, 'name'), CODE, ('sites[0].name', 'is no module of this ResNet')),
    ((*SITE, 'name'), 'layer1.0.conv1', ('operations[0]', 'layer1.0.conv1')),
    ((*SITE, 'name'), 'layer1.9', ("'layer1.9' is no module", 'Close: layer1.0')),
    ((*SITE, 'name'), 'x' * 10**6, ('sites[0].name: a text of 1000000 characters',)),
    ((*SITE, 'attribute'), '__class__', ('sites[0]: layer1.0.__class__ cannot be made', "named 'sem' here")),
    ((*SITE, 'attribute'), 'conv1', ('sites[0]: layer1.0.conv1 cannot be made',)),
    ((*SITE, 'position'), 'output', ("sites[0].position: layer1.0 has 'residual'", "'output'")),
    ((*SITE, 'position'), 'core', ('sites[0].widths', "'channel")),
    ((*SITE, 'class_name'), 'Bottleneck', ('sites[0].class_name', "'BasicBlock'", "'Bottleneck'")),
    ((*SITE, 'widths', 'channels'), 64, ('sites[0].channels: layer1.0 has 32', '64 in the patch')),
    ((*SITE, 'widths', 'heads'), 1, ("sites[0].widths: field 'heads' is unknown",)),
    ((*SITE, 'shape'), [2] * 100, ('sites[0].shape: a list of 100 entries',)),
    ((*SITE, 'num_parameters'), -1, ('sites[0].num_parameters: -1 is out of range',)),
    (at('weights', 'file'), '../patch.safetensors', ("weights.file: '../patch.safetensors' is not of the form",)),
    (at('weights', 'file'), '/etc/passwd', ('weights.file', 'is not of the form')),
    (at('weights', 'file'), 'patch.pkl', ('weights.file', 'is not of the form')),
    (at('weights', 'size'), 10**18, ('weights.size', 'out of range')),
    (at('weights', 'digest'), 'zz', ('weights.digest', 'is not of the form')),
    (at('weights', 'digest'), '0' * 32, ('safetensors was changed or damaged', 'weights.digest')),
    (at('tensors'), None, ('tensors: an object',)),
    (at('tensors', CODE), {'part': 'new', 'dtype': 'float32', 'shape': [1]}, ('lacks the tensor',)),
    ((*TENSOR, 'shape'), [2**31] * 16, ('layer1.0.sem.decision.weight', '2147483648', '(3, 32)')),
    ((*TENSOR, 'shape'), [-1], ('shape[0]: -1 is out of range',)),
    ((*TENSOR, 'shape'), [3.0, 32.0], ('shape[0]: an integer is needed',)),
    ((*TENSOR, 'dtype'), 'load', ("dtype: 'load' is unknown",)),
    ((*TENSOR, 'part'), 'head', ('tensors.layer1.0.sem.decision.weight.part: the model has it in new, not in head',)),
    ((*TENSOR, 'part'), 'all', ("part: 'all' is unknown",)),
    ((*PRINT, 'dtype'), 'nn', ("fingerprints.conv1.0.weight.dtype: 'nn' is unknown",)),
    ((*PRINT, 'digests'), {}, ("conv1.0.weight.digests: lacks 'float32'",)),
    ((*PRINT, 'digests', 'float32'), CODE, ('digests.float32', 'is not of the form')),
]


@pytest.mark.parametrize('case', range(len(VALUES)), ids=lambda case: '.'.join(map(str, VALUES[case][0])))
def test_values(folder: Path, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, value, parts = VALUES[case]

    def put(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    edit_json(folder, put)
    monkeypatch.chdir(folder)
    with refused(model := base(), PatchFileError, str(folder), *parts):
        sem_timm.load_patch(model, folder)
    assert not (folder / 'pwned').exists()


MISSING = [
    *((key,) for key in ('versions', 'base', 'operations', 'weights', 'tensors', 'fingerprints', 'format_version')),
    *((*SITE, key) for key in ('name', 'class_name', 'position', 'attribute', 'widths', 'shape')),
    *(('operations', 0, key) for key in ('operation', 'options', 'sites', 'input_size')),
    *(('weights', key) for key in ('file', 'size', 'digest')),
    (*TENSOR, 'part'),
    (*PRINT, 'digests'),
    (*OPTIONS, 'reduction'),
]


@pytest.mark.parametrize('path', MISSING, ids=lambda path: '.'.join(map(str, path)))
def test_missing_fields(folder: Path, path: tuple[Any, ...]) -> None:
    def take(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    edit_json(folder, take)
    with refused(model := base(), PatchFileError, str(folder / 'patch.json'), repr(path[-1])):
        sem_timm.load_patch(model, folder)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def replace(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return replace


TEXTS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    'duplicate': (replaced('"format_version": 1,', '"format_version": 1, "format_version": 1,'), ('stands twice',)),
    'duplicate_inside': (replaced('"reduction": 16,', '"reduction": 16, "reduction": 8,'), ("'reduction'", 'twice')),
    'nan': (replaced('"reduction": 16', '"reduction": NaN'), ('NaN is no number',)),
    'infinity': (replaced('"reduction": 16', '"reduction": -Infinity'), ('-Infinity is no number',)),
    'too_large': (replaced('"reduction": 16', '"reduction": 1e999'), ('1e999 is too large',)),
    'many_digits': (replaced('"reduction": 16', '"reduction": ' + '9' * 100_000), ('has 100000 digits',)),
    'deep': (lambda text: '[' * 1_000_000, ('nested too deeply',)),
    'deep_inside': (replaced('"reduction": 16', '"reduction": ' + '[' * 10**5 + ']' * 10**5), ('nested too deeply',)),
    'empty': (lambda text: '', ('no valid JSON, or was cut off',)),
    'cut_off': (lambda text: text[: len(text) // 2], ('no valid JSON, or was cut off', 'line')),
    'null': (lambda text: 'null', ('an object', 'not None')),
    'number': (lambda text: '7', ('an object', 'not 7')),
    'python': (lambda text: f'json.loads({CODE!r})', ('no valid JSON',)),
    'pickle': (lambda text: '\x80\x04\x95', ('no valid JSON',)),
    'other_json': (lambda text: '{"architecture": "resnet50"}', ("'format_version'", 'save_patch')),
}


@pytest.mark.parametrize('case', TEXTS)
def test_texts(folder: Path, case: str) -> None:
    edit, parts = TEXTS[case]
    file = folder / 'patch.json'
    file.write_text(edit(file.read_text()), encoding='latin-1')
    with refused(model := base(), PatchFileError, str(file), *parts):
        sem_timm.load_patch(model, folder)


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / 'patch.json').write_bytes(b'{"a": "\xff"}')
    with refused(model := base(), PatchFileError, 'no valid JSON', 'utf-8'):
        sem_timm.load_patch(model, folder)


def test_a_file_without_an_end(folder: Path) -> None:
    with (folder / 'patch.json').open('ab') as stream:
        stream.truncate(2**31)  # holes take no space on the disk
    with refused(model := base(), PatchFileError, 'is longer than'):
        sem_timm.load_patch(model, folder)


def test_folders_that_hold_no_patch(tmp_path: Path) -> None:
    for place, part in ((tmp_path / 'nowhere', 'no such folder'), (tmp_path, 'holds nothing')):
        with refused(model := base(), PatchFileError, str(place / 'patch.json'), part, 'save_patch'):
            sem_timm.load_patch(model, place)
    (tmp_path / 'model.safetensors').touch()
    with refused(model := base(), PatchFileError, 'the folder holds model.safetensors'):
        sem_timm.load_patch(model, str(tmp_path))
    (tmp_path / 'patch.json').mkdir()
    with refused(model := base(), PatchFileError, 'patch.json'):
        sem_timm.load_patch(model, tmp_path)


@pytest.mark.parametrize('options', [{'memory': 10**15}, {'memory': 'x'}, {'memory': [8]}, {'memory': 0}, {'dim': 8}])
def test_options_of_attentions(tmp_path: Path, options: dict[str, Any]) -> None:
    sem_timm.save_patch(of_case('external'), tmp_path)
    edit_json(tmp_path, lambda data: data['operations'][0]['options'].update(options))
    with refused(model := base('vit_registers'), PatchFileError, 'patch.json: operations[0].options'):
        sem_timm.load_patch(model, tmp_path)


def test_memory_is_not_given_for_what_the_file_does_not_hold(tmp_path: Path) -> None:
    """A patch that promises a million memories and brings eight."""
    sem_timm.save_patch(of_case('external'), tmp_path)

    def promise(data: Any) -> None:
        operation = data['operations'][0]
        factor = 2**20 // operation['options']['memory']
        operation['options']['memory'] = 2**20
        for site in operation['sites']:
            site['num_parameters'] *= factor

    edit_json(tmp_path, promise)
    with refused(model := base('vit_registers'), PatchFileError, 'operations[0]', 'fewer values'):
        sem_timm.load_patch(model, tmp_path)


def test_every_field_of_any_type(folder: Path) -> None:
    """Whatever stands in any field: a patch that loads, or this error."""
    text, model = (folder / 'patch.json').read_text(), base()
    before = snapshot(model)
    values: tuple[Any, ...] = (None, True, -1, 2**63, 0.5, '', 'x', [], [[]], {}, {'x': 1})
    paths = _paths(json.loads(text))
    for number, path in enumerate(paths):
        for value in values[number % 5 :: 5]:
            data = inner = json.loads(text)
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (folder / 'patch.json').write_text(json.dumps(data))
            try:
                sem_timm.load_patch(model, folder, check_base='ignore')
            except PatchFileError as error:
                assert str(folder) in str(error)
            else:
                sem_timm.unpatch_model(model)
            assert_same(before, snapshot(model))
    assert len(paths) > 100


def _paths(data: Any, depth: int = 0) -> list[tuple[Any, ...]]:
    entries = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    kept = entries if depth in (0, 2) or len(entries) < 12 else entries[:2]
    return [(key, *rest) for key, value in kept for rest in [(), *_paths(value, depth + 1)]]
