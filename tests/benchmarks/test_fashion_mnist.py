"""The comparison on Fashion-MNIST, on a few random images."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sem_timm

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports a script of the folder of benchmarks as if it were run there."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four idx files: 64 and 40 images of random numbers whose mean is their class."""
    generator = np.random.default_rng(0)
    for part, count in {'train': 64, 't10k': 40}.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        noise = generator.integers(0, 25, (count, 28, 28))
        write_idx(tmp_path / f'{part}-images-idx3-ubyte.gz', (noise + 25 * labels[:, None, None]).astype(np.uint8))
        write_idx(tmp_path / f'{part}-labels-idx1-ubyte.gz', labels)
    return tmp_path


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def small(folder: Path, *names: str, seeds: int = 2) -> list[str]:
    sizes = ['--depth', '8', '--epochs', '1', '--train-images', '32', '--batch-size', '16', '--seeds', str(seeds)]
    places = ['--data', str(folder), '--log', str(folder / 'log.jsonl'), '--docs', str(folder)]
    places += ['--stopped', str(folder / 'stopped')]
    return [*sizes, *places, '--only', *names]


def records(folder: Path, kind: str) -> list[dict]:
    found = map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
    return [record for record in found if record['kind'] == kind]


def test_command_trains_logs_and_writes_the_page(
    load: type[ModuleType], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load('common.measuring'), 'SERIES_SECONDS', 0.0)
    command = small(folder, 'plain', 'sem-softmax', 'sem-no-decision', 'self-attention', 'external')
    with torch.random.fork_rng(devices=[]):
        load('fashion_mnist').main([*command, '--part', '0/2'])
        load('fashion_mnist').main([*command, '--part', '1/2'])
    runs, costs = records(folder, 'run'), records(folder, 'cost')
    assert len(runs) == 2 * (3 * 2 + 2) and len(costs) == 2
    assert {run['seed'] for run in runs} == {0, 1} and all(0 <= run['accuracy'] <= 100 for run in runs)
    assert [*costs[0]['ratios']] == ['plain', 'sem-softmax', 'sem-no-decision'] and costs[0]['ratios']['plain'] == 1
    page = (folder / 'results.md').read_text(encoding='utf-8')
    for part in (
        'ResNet-8, augmentation: crop-flip',
        'SEM, softmax decision',
        'External Attention',
        'pooled over the 3',
        'spread over channels',
        '| operator | epoch 1 |',
    ):
        assert part in page
    assert '--depth 8 --epochs 1' in page and str(folder) not in page
    with Image.open(folder / 'results.png') as picture:
        assert picture.width > 800
    assert not list((folder / 'stopped').iterdir())
    lines = (folder / 'log.jsonl').read_text().splitlines()
    (folder / 'log.jsonl').write_text('\n'.join([*lines[:-1], lines[-1][:40]]))  # as a kill may leave it
    capsys.readouterr()
    load('fashion_mnist').main(command)
    assert capsys.readouterr().out.count(' %, ') == 1  # one training again
    load('fashion_mnist').main([*command, '--render'])
    assert page.splitlines()[:12] == (folder / 'results.md').read_text(encoding='utf-8').splitlines()[:12]


def test_a_run_is_the_same_when_repeated(load: type[ModuleType], folder: Path) -> None:
    training, models = load('fashion.training'), load('fashion.models')
    data = [load('fashion.data').fashion_mnist(folder, part) for part in ('train', 't10k')]
    setting = training.Setting('resnet', 8, train_images=64, epochs=2, batch_size=16, precision='float32')
    run = training.Run(setting, models.RESNETS[4], 'crop-flip', seed=3)
    with torch.random.fork_rng(devices=[]):
        first, second = (training.train_and_measure(run, *data, folder / kept) for kept in ('one', 'other'))
    assert first['losses'] == second['losses'] and first['accuracy'] == second['accuracy']
    assert first['mean'].keys() == {'se', 'eca', 'ie'} and first['without_gradient'] == []
    assert len(first['decided']) == 2 and first['decided'][1].keys() == first['mean'].keys()


@pytest.mark.parametrize('schedule', ['cosine', 'drops'])
def test_a_run_that_was_stopped_goes_on(
    load: type[ModuleType], folder: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    training, models, stopped = load('fashion.training'), load('fashion.models'), load('fashion.stopped')
    data = [load('fashion.data').fashion_mnist(folder, part) for part in ('train', 't10k')]
    sizes = {'train_images': 64, 'epochs': 4, 'batch_size': 16, 'precision': 'float32'}
    setting = training.Setting('resnet', 11, **sizes, schedule=schedule, bottlenecks=True)
    run = training.Run(setting, models.RESNETS[4], 'crop-flip', seed=3)
    save = stopped.Kept.save

    def killed(kept: Any, state: dict[str, Any]) -> None:
        save(kept, state)
        if len(state['losses']) == 2:
            raise KeyboardInterrupt

    with torch.random.fork_rng(devices=[]):
        whole = training.train_and_measure(run, *data, folder / 'whole')
        with monkeypatch.context() as patch:
            patch.setattr(stopped.Kept, 'save', killed)
            with pytest.raises(KeyboardInterrupt):
                training.train_and_measure(run, *data, folder / 'stopped')
        assert len(list((folder / 'stopped').iterdir())) == 1
        again, measured = (training.train_and_measure(run, *data, folder / 'stopped') for _ in range(2))
    same = ('losses', 'accuracy', 'mean', 'gate_contrast', 'decided', 'without_gradient')
    for other in (again, measured):  # the last one is stopped between training and log
        assert [whole[name] for name in same] == [other[name] for name in same] and len(whole['losses']) == 4


def test_the_learning_rate_drops_twice(load: type[ModuleType], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, models = load('fashion.training'), load('fashion.models')
    data = [load('fashion.data').fashion_mnist(folder, part) for part in ('train', 't10k')]
    setting = training.Setting('resnet', 8, train_images=64, epochs=8, batch_size=16, schedule='drops')
    rates = []
    step = training._step

    def watched(model: Any, optimizer: torch.optim.Optimizer, *given: Any) -> Any:
        rates.append(optimizer.param_groups[0]['lr'])
        return step(model, optimizer, *given)

    monkeypatch.setattr(training, '_step', watched)
    with torch.random.fork_rng(devices=[]):
        training.train_and_measure(training.Run(setting, models.RESNETS[0], 'none', 0), *data, folder / 'stopped')
    assert [round(rate, 6) for rate in rates[::4]][1:] == [0.1] * 3 + [0.01] * 2 + [0.001] * 2


def test_what_was_put_in_may_learn_faster(load: type[ModuleType]) -> None:
    training, models = load('fashion.training'), load('fashion.models')
    setting = training.Setting('resnet', 8, train_images=64, epochs=1)
    variant = next(variant for variant in models.RESNETS if variant.new_lr_scale == 10)
    with torch.random.fork_rng(devices=[]):
        model = setting.create(variant, 0)
    base, new = setting.optimizer(model, variant.new_lr_scale).param_groups
    assert (base['lr'], new['lr']) == (0.1, 1.0) and base['weight_decay'] == new['weight_decay'] == 1e-4
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all('.sem.' in names[id(parameter)] for parameter in new['params'])
    assert not any('.sem.' in names[id(parameter)] for parameter in base['params'])
    assert len(base['params']) + len(new['params']) == len(names)


def test_settings_of_before_are_known_by_what_they_were(load: type[ModuleType]) -> None:
    setting = load('fashion.training').Setting('resnet', 20, 10_240, 4)
    assert 'schedule' not in setting.key and 'bottlenecks' not in setting.key
    assert load('fashion.training').Setting('resnet', 20, 10_240, 4, schedule='drops').key['schedule'] == 'drops'


def test_variants_differ_in_what_is_inserted_alone(load: type[ModuleType]) -> None:
    models = load('fashion.models')
    with torch.random.fork_rng(devices=[]):
        plain = models.create('resnet', models.RESNETS[0], 8, 5).state_dict()
        for variant in models.RESNETS[1:]:
            model = models.create('resnet', variant, 8, 5)
            state = model.state_dict()
            assert len(sem_timm.patched_modules(model)) == 3
            assert all(torch.equal(state[name], value) for name, value in plain.items())
        operators = [variant.options.get('operators', ()) for variant in models.RESNETS]
        assert {len(names) for names in operators} == {0, 2, 3, 4, 5}


def test_resnets_have_the_published_number_of_parameters(load: type[ModuleType]) -> None:
    with torch.device('meta'):
        model = load('fashion.models').resnet(164)
    # The published one has three input channels.
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_704_154 - 16 * 2 * 9
    with pytest.raises(SystemExit, match=r'--depth 21.*20 or 56'):
        load('fashion.models').resnet(21)


def test_crops_move_and_mirror_each_image_by_itself(load: type[ModuleType]) -> None:
    data = load('fashion.data')
    images = torch.arange(1, 785, dtype=torch.float32).view(1, 1, 28, 28).expand(400, -1, -1, -1)
    cropped = data.crop_and_flip(images, torch.Generator().manual_seed(0))
    assert cropped.shape == images.shape
    middle = cropped[:, 0, 14, 14]
    rows, columns = ((middle.long() - 1) // 28).unique(), ((middle.long() - 1) % 28).unique()
    assert rows.tolist() == list(range(10, 19)) and columns.tolist() == list(range(9, 19))
    mirrored = cropped[:, 0, 14, 13] > middle
    assert 150 < mirrored.sum() < 250
    outside = cropped[cropped < 1]
    torch.testing.assert_close(outside, torch.full_like(outside, -data.MEAN / data.STD))


def test_reading_calls_noise_noise(load: type[ModuleType]) -> None:
    reading = load('fashion.reading')
    lines = [
        reading.Line('plain', 'plain', 1, {0: 80.0, 1: 81.0, 2: 82.0}),
        reading.Line('se', 'SE', 1, {0: 80.5, 1: 81.5, 2: 82.5}),
        reading.Line('sem', 'SEM', 1, {0: 90.0, 1: 91.0, 2: 92.0}),
        reading.Line('ie', 'IE', 1, {0: 70.0, 1: 71.0, 2: 72.0}),
    ]
    assert reading.noise(lines) == pytest.approx(1)
    assert reading.threshold(1.0, 3) == pytest.approx(2 * (2 / 3) ** 0.5)
    text = reading.reading('plain', lines)
    assert '- better: *SEM*.' in text and '- worse: *IE*.' in text and '- not told apart from it: *SE*.' in text
    once = reading.Line('eca', 'ECA', 1, {0: 77.5})  # below by more than three seeds have to differ, and one has not
    assert 'not told apart from it: *SE*; *ECA*.' in reading.reading('plain', [*lines, once])
    alone = [reading.Line('plain', 'plain', 1, {0: 80.0}), reading.Line('se', 'SE', 1, {0: 99.0})]
    assert 'no difference here means anything' in reading.reading('plain', alone)


def test_twice_the_epochs_are_told_beside_the_table(load: type[ModuleType]) -> None:
    results, setting = load('fashion.results'), load('fashion.training').Setting
    told = {'kind': 'run', 'augmentation': 'none', 'parameters': 1, 'seconds': 1.0, 'cpu_seconds': 1.0}
    told |= {'machine': dict.fromkeys(('processor', 'threads', 'torch', 'timm'), ''), 'python': '', 'date': ''}
    told |= {'command': 'python', 'sem_timm': ''}
    long, short = (setting('resnet', 20, 60_000, epochs).key for epochs in (8, 4))
    runs = [('plain', 0, short, 90.0), ('se', 0, short, 91.0), ('plain', 0, long, 90.5), ('plain', 1, long, 70.0)]
    names = ('variant', 'seed', 'setting', 'accuracy')
    found = results.sections({**told, **dict(zip(names, run)), 'train_loss': 0.25} for run in runs)
    assert all(line.train_loss == 0.25 for line in found[0].tables['none'])
    assert [section.setting.epochs for section in found] == [4]
    assert 'twice as many epochs *plain* reaches 90.50 (seed 0), +0.50 points' in results.markdown(found)


@pytest.mark.parametrize(
    ('options', 'message'),
    [(['--part', '2/2'], 'not of the form'), (['--only', 'semm'], 'invalid choice'), (['--render'], 'no finished')],
)
def test_what_cannot_be_done_is_explained(
    load: type[ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        load('fashion_mnist').main(['--log', str(tmp_path / 'log.jsonl'), *options])
    assert message in f'{error.value} {capsys.readouterr().err}'
