"""Whole comparisons, small: what is the same in paired runs, what is written, and how they go on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import sem_timm.comparison.calls as calls
from sem_timm import NoMatchError, OptionError
from sem_timm.comparison import ComparisonResult, Row, compare
from sem_timm.comparison.log import Log, claimed
from sem_timm.comparison.result import row_results
from sem_timm.comparison.runs import lock_of
from sem_timm.errors import MissingPackageError
from sem_timm.finetuning import CheckpointError, DataError, StoppedError
from tests.comparison.small_comparisons import compare_small, lines, options, stopped_after
from tests.finetuning.small_runs import column, write_images


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('comparison') / 'whole'


@pytest.fixture(scope='module')
def result(images: Path, weights: Path, folder: Path) -> ComparisonResult:
    rows = ('none none:name=again sem external', Row(name='late', operation='se', target='layer4.*'))
    given = {'operations': rows, 'weights': str(weights), 'keep_runs': True, 'costs': True, 'measure_every': 1}
    return compare_small(images, folder, **given)


def runs_of(folder: Path, row: str, seed: int) -> Path:
    (found,) = folder.glob(f'runs/{row}-*-seed{seed}-*[!k]')
    return found


@pytest.mark.parametrize('seed', [0, 1])
def test_runs_that_are_told_the_same_are_the_same_bit_for_bit(
    result: ComparisonResult, folder: Path, seed: int
) -> None:
    first, again, sem = (runs_of(folder, name, seed) for name in ('none', 'again', 'sem'))
    for kind in ('train', 'validation'):
        assert column(first, 'loss', kind) == column(again, 'loss', kind)
    assert column(first, 'loss') != column(sem, 'loss')
    assert column(first, 'loss') != column(runs_of(folder, 'none', 1 - seed), 'loss')


@pytest.mark.parametrize('seed', [0, 1])
def test_an_identity_begins_at_the_same_loss_and_not_the_same_gradient(
    result: ComparisonResult, folder: Path, seed: int
) -> None:
    first, sem = runs_of(folder, 'none', seed), runs_of(folder, 'sem', seed)
    assert column(first, 'loss')[0] == column(sem, 'loss')[0]
    assert column(first, 'gradient_norm')[0] != column(sem, 'gradient_norm')[0]


def test_rows_are_compared_in_pairs(result: ComparisonResult) -> None:
    again, sem = result['again'], result['sem']
    assert again.difference is not None and again.difference.mean == 0 and again.difference.num_pairs == 2
    assert sem.difference == result.difference('sem', 'none') and result['none'].difference is None
    means = [result['sem'].accuracies[seed] - result['none'].accuracies[seed] for seed in (0, 1)]
    assert sem.difference is not None and sem.difference.mean == pytest.approx(sum(means) / 2)
    assert 'again cannot be told apart from none' in str(result)


def test_what_the_model_refuses_is_a_row_that_says_why(result: ComparisonResult, folder: Path) -> None:
    row = result['external']
    assert row.refused is not None and 'external' in row.refused and row.accuracies == {} and row.costs is None
    assert f'external was not run: {row.refused}' in result.conclusions
    (printed,) = (line for line in result.table().splitlines() if line.startswith('external'))
    assert 'refused' in printed
    assert not list(folder.glob('runs/external*'))


def test_costs_are_those_of_the_models(result: ComparisonResult) -> None:
    base, sem, late = (result[name].costs for name in ('none', 'sem', 'late'))
    assert base is not None and sem is not None and late is not None
    assert sem.parameters - base.parameters == sem.new_parameters > late.new_parameters > base.new_parameters == 0
    assert base.macs is not None and sem.macs is not None and sem.macs > base.macs
    assert base.trained_parameters == base.parameters and base.file_bytes >= 4 * base.parameters
    assert sem.baseline == 'none' and sem.step_ratio is not None and sem.peak_ratio is not None
    assert sem.step_ratio > 0 and 0.5 < sem.peak_ratio < 3 and sem.batch_size == 8


def test_tables_are_written(result: ComparisonResult, folder: Path) -> None:
    assert json.loads((folder / 'results.json').read_text()) == json.loads(json.dumps(result.to_dict()))
    with (folder / 'results.csv').open(newline='') as stream:
        rows = {row['row']: row for row in csv.DictReader(stream)}
    assert [*rows] == [row.name for row in result.rows]
    assert float(rows['sem']['accuracy']) == result['sem'].mean and rows['external']['accuracy'] == ''
    assert float(rows['sem']['accuracy_seed_1']) == result['sem'].accuracies[1]
    page = (folder / 'results.md').read_text()
    assert page.count('\n| ') == 1 + len(rows) and all(sentence[:20] in page for sentence in result.conclusions)
    assert (folder / 'results.tex').read_text().count(r' \\') == 1 + len(rows)
    assert (folder / 'results.png').read_bytes().startswith(b'\x89PNG')


def test_rows_and_seeds_are_added_and_nothing_is_done_twice(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    compare_small(images, folder, operations='none', seeds=(0,))
    first = lines(folder, 'run')
    result = compare(resume=str(folder), operations='none,eca', seeds=2, progress=False)
    assert lines(folder, 'run')[:1] == first and len(lines(folder, 'run')) == 4
    assert [row.name for row in result.rows] == ['none', 'eca'] and result.num_pending == 0
    assert sorted(result['eca'].accuracies) == [0, 1] and not (folder / 'runs').exists()
    before = (folder / 'log.jsonl').read_bytes()
    assert compare(resume=str(folder), progress=False).to_dict() == result.to_dict()
    assert (folder / 'log.jsonl').read_bytes() == before


def test_two_that_share_a_log_do_what_one_does(images: Path, tmp_path: Path) -> None:
    whole, shared = tmp_path / 'whole', tmp_path / 'shared'
    rows = {'operations': 'none,eca'}
    expected = compare_small(images, whole, **rows)
    half = compare_small(images, shared, **rows, seeds=(1,))
    assert half['eca'].difference is not None and half['eca'].difference.low is None
    assert 'There is no interval, and one seed tells nothing; give at least --seeds 3' in str(half)
    both = compare(resume=str(shared), seeds=(0,), progress=False)
    assert both['eca'].accuracies == expected['eca'].accuracies and both['eca'].losses == expected['eca'].losses
    assert both['eca'].difference == expected['eca'].difference


def test_a_run_that_another_process_is_about_is_left_to_it(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    compare_small(images, folder, operations='none', seeds=(0,))
    log = Log(folder)
    record = log.read()
    (key,) = record.runs
    other = type(key)('none', 1, key.lr)
    with claimed(lock_of(folder, other)) as mine:
        assert mine
        result = compare(resume=str(folder), seeds=3, progress=False)
    assert sorted(result['none'].accuracies) == [0, 2]
    assert result.num_pending == 1 and 'Runs that are still to be done: 1; sem-timm compare --resume' in str(result)


def test_other_data_and_another_recipe_are_refused(images: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / 'run', tmp_path / 'other'
    compare_small(images, folder, operations='none', seeds=1)
    with pytest.raises(OptionError, match=r'made with another recipe: lr=0.001 there and 0.01 here. Leave that out'):
        compare(resume=str(folder), lr=0.01)
    shutil.copytree(images, other)
    assert compare(resume=str(folder), data=str(other), progress=False).num_pending == 0  # the same images, elsewhere
    next((other / 'train' / 'cross').glob('*.png')).unlink()
    with pytest.raises(OptionError, match=r'made with other data than .*: num_train=48 there and 47 here'):
        compare(resume=str(folder), data=str(other))
    shutil.copy(images / 'train' / 'circle' / '0.png', other / 'train' / 'cross' / '99.png')
    with pytest.raises(OptionError, match=r'made with other data than .*: digest='):
        compare(resume=str(folder), data=str(other))
    with pytest.raises(OptionError, match='leave out search'):
        compare(resume=str(folder), search='lr')
    with pytest.raises(OptionError, match="has another row 'none' already; give this one another name"):
        compare(resume=str(folder), operations='sem:name=none')


def test_a_log_that_is_older_than_an_option_goes_on_without_it(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    compare_small(images, folder, operations='none', seeds=1)
    file = folder / 'log.jsonl'
    begun, *rest = map(json.loads, file.read_text().splitlines())
    del begun['recipe']['head_scale']
    file.write_text(''.join(json.dumps(line) + '\n' for line in (begun, *rest)))
    assert compare(resume=str(folder), progress=False).num_pending == 0
    with pytest.raises(OptionError, match=r'made with another recipe: head_scale=1.0 there and 0.0 here'):
        compare(resume=str(folder), head_scale=0.0)


def test_diverged_runs_are_counted_and_shown(images: Path, weights: Path, tmp_path: Path) -> None:
    result = compare_small(
        images, tmp_path / 'run', operations='none,sem', lr=1e30, warmup_epochs=0.0, weights=str(weights)
    )
    row = result['sem']
    assert row.mean is None and sorted(row.diverged) == [0, 1] and 'at step' in row.diverged[0]
    assert 'sem diverged in 2 of 2 runs, which are in no mean: seed 0, the ' in str(result)
    assert 'none has no finished run; without it nothing can be compared.' in result.conclusions
    assert 'diverged' in result.table() and json.dumps(result.to_dict(), allow_nan=False)


def test_the_search_has_as_many_tries_for_each_and_never_sees_the_validation_images(
    images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / 'run'
    given: dict[str, Any] = {'operations': 'none,eca', 'search': 'lr', 'lr_factors': (1e-6, 1.0), 'batch_size': 4}
    result = compare_small(images, folder, **given, seeds=1, epochs=4, lr=3e-3)
    tries = [entry for entry in lines(folder, 'run') if entry['is_try']]
    assert len(tries) == 4 and all(entry['images'] == [38, 10] for entry in tries)
    finals = [entry for entry in lines(folder, 'run') if not entry['is_try']]
    assert len(finals) == 2 and all(entry['images'] == [48, 15] for entry in finals)
    assert result['none'].lr == result['eca'].lr == 3e-3  # with the other one nothing moves
    assert 'none does best with the highest learning rate that was tried, 0.003; others may be better.' in str(result)
    assert 'the best of 2 learning rates x 1 seeds, on 20% of the training images held out' in result.table()


def test_a_stopped_comparison_goes_on_within_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_small(images, tmp_path / 'whole', operations='none,eca', seeds=1)
    folder = tmp_path / 'run'
    stops = pytest.raises(StoppedError, match=r'it goes on with: sem-timm compare --resume .*run')
    with stopped_after(20, monkeypatch), stops as caught:
        compare_small(images, folder, operations='none,eca', seeds=1)
    assert caught.value.exit_code == 130
    assert list(folder.glob('runs/eca*/checkpoints/step-*')) and len(lines(folder, 'run')) == 1
    assert compare(resume=str(folder), progress=False)['eca'].losses == whole['eca'].losses


def test_a_damaged_checkpoint_costs_the_run_and_no_more(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    first = compare_small(images, folder, operations='none', seeds=1, keep_runs=True)
    log = folder / 'log.jsonl'
    log.write_text(''.join(line for line in log.read_text().splitlines(True) if '"kind": "run"' not in line))
    for file in folder.glob('runs/*/checkpoints/step-*/state.json'):
        file.write_text('{')
    assert compare(resume=str(folder), progress=False)['none'].losses == first['none'].losses


@pytest.mark.parametrize(
    ('given', 'error', 'part'),
    [
        ({'operations': 'none,semm'}, OptionError, "operation 'semm' is unknown. Close: sem"),
        ({'operation': 'sem'}, OptionError, "option 'operation' is said by the rows"),
        ({'epoch': 3}, OptionError, "option 'epoch' is unknown. Close: epochs"),
        ({'seeds': 0}, OptionError, 'seeds=0 is out of range: at least one seed'),
        ({'seeds': (1, 1)}, OptionError, 'are no numbers from 0 on, each once'),
        ({'seeds': -1}, OptionError, 'at least one seed'),
        ({'seeds': '0-1'}, OptionError, "seeds='0-1' are no whole numbers; such as 5, or (0, 1, 2)"),
        ({'seeds': 2.0}, OptionError, 'seeds=2.0 are no whole numbers'),
        ({'lr_factors': 'all'}, OptionError, "lr_factors='all' are no numbers"),
        ({'search': 'lr', 'search_seeds': 3}, OptionError, 'search_seeds=3 are more than the 2 seeds of the runs'),
        ({'operations': ('none', torch.nn.Identity)}, OptionError, 'has no name that a log could hold'),
        ({'operations': ('none', None)}, OptionError, 'operation=None has no name'),
        (
            {'operations': 'none,external', 'position': 'output'},
            OptionError,
            'position=output: no row here takes it; leave it',
        ),
        ({'operations': 'none', 'target': 'layer4.*'}, OptionError, 'no row here takes it; leave it out'),
        ({'operations': 'none se:target=layer3.*', 'target': 'layer4'}, OptionError, 'no row here takes it'),
        ({'train': ()}, OptionError, 'train=() leaves no row'),
        ({'auto_augment': 'foo'}, OptionError, 'is no policy of timm'),
        ({'search': 'wd'}, OptionError, "search='wd' is unknown"),
        ({'lr_factors': ()}, OptionError, 'are no factors above 0'),
        ({'baseline': 'nothing'}, OptionError, "baseline 'nothing' is no row. Close: none"),
        ({'model': 'resnettt'}, OptionError, "model 'resnettt' is unknown"),
        ({'model': 'test_resnet_sem'}, OptionError, 'test_resnet_sem has sem already, so that no row would be without'),
        ({'data': '/nowhere'}, DataError, "data '/nowhere' is no file or folder here"),
        ({'operations': 'none,external,linear'}, OptionError, 'nothing is left to compare none with. external: '),
        ({'batch_size': 64}, DataError, 'fewer than one update takes'),
        ({'search': 'lr', 'batch_size': 40}, DataError, 'fewer than one update takes'),
        ({'max_train_images': 4}, DataError, 'has 4 images for training, fewer than one update'),
        ({'search': 'lr', 'tuning_fraction': 0.001}, DataError, 'try a larger --tuning-fraction'),
        ({'train': ('norm',)}, OptionError, "train='norm' is unknown. Close: norms"),
        ({'resume': '/nowhere'}, CheckpointError, '/nowhere has no log of a comparison'),
    ],
    ids=str,
)
def test_bad_input_is_told_before_anything_is_written(
    given: dict[str, Any], error: type[Exception], part: str, images: Path, tmp_path: Path
) -> None:
    asked = {**options(images, tmp_path / 'run'), **given}
    if 'resume' in given:
        asked = given
    with pytest.raises(error) as caught:
        compare(**asked)
    assert part in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_one_class_and_an_empty_one_are_told(tmp_path: Path) -> None:
    data = write_images(tmp_path / 'data', splits=False)
    shutil.rmtree(data / 'cross')
    (data / 'cross').mkdir()
    result = compare_small(data, tmp_path / 'run', operations='none', seeds=1)
    assert result.told['num_classes'] == 2
    shutil.rmtree(data / 'square')
    with pytest.raises(DataError, match='has a single class'):
        compare_small(data, tmp_path / 'other', operations='none', seeds=1)


def test_a_folder_that_is_taken_is_left_alone(images: Path, folder: Path, result: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match='exists and is not empty; go on with it by --resume'):
        compare_small(images, folder)
    (tmp_path / 'file').write_text('')
    with pytest.raises(OptionError, match='is a file; name a new folder'):
        compare_small(images, tmp_path / 'file')


def test_without_a_picture_library_the_rest_is_written(
    result: ComparisonResult, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*given: Any) -> None:
        raise ImportError('matplotlib')

    monkeypatch.setattr(calls, 'draw', draw)
    compare(resume=str(folder), progress=False)
    assert (folder / 'results.md').is_file()


def test_rows_that_another_process_adds_meanwhile_are_done(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, do_run = tmp_path / 'run', calls.do_run

    def adding(*given: Any) -> dict[str, Any]:
        log = Log(folder)
        if 'eca' not in log.read().rows:
            log.append('row', row=Row(operation='eca', train='all').to_dict(), refused=None)
        return do_run(*given)

    monkeypatch.setattr(calls, 'do_run', adding)
    result = compare_small(images, folder, operations='none', seeds=1)
    assert [*result['eca'].accuracies] == [0] and result.num_pending == 0


def test_what_may_differ_from_one_start_to_the_next(images: Path, tmp_path: Path) -> None:
    data = shutil.copytree(images, tmp_path / 'images')
    folder, broken = tmp_path / 'run', data / 'train' / 'cross' / '0.png'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(DataError, match='--skip-bad-images'):
        compare_small(data, folder, operations='none', seeds=1)
    result = compare(resume=str(folder), skip_bad_images=True, progress=False)
    assert result.num_pending == 0 and 'could not be read and were left out: up to 1 in a run.' in str(result)
    with pytest.raises(OptionError, match='workers=-1 is out of range'):
        compare(resume=str(folder), workers=-1)
    log = folder / 'log.jsonl'
    log.write_text(log.read_text().replace('"recipe": {', '"recipe": {"warp": 1, ', 1))
    with pytest.raises(CheckpointError, match='says warp, which this version of sem_timm does not know'):
        compare(resume=str(folder))


def test_seeds_and_operations_may_be_read_but_once(images: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {'seeds': np.arange(1), 'operations': (name for name in ('none', 'eca'))}
    result = compare_small(images, tmp_path / 'run', **given)
    assert [[*row.accuracies] for row in result.rows] == [[0], [0]]
    assert compare(resume=tmp_path / 'run', seeds=iter([1]), progress=False)['eca'].difference is not None


def test_a_row_whose_line_is_damaged_is_missed_and_comes_back_by_name(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    whole = compare_small(images, folder, operations='none,eca,ie', seeds=1)
    log = folder / 'log.jsonl'
    text = log.read_text()

    def damage(name: str) -> None:
        kept = text.splitlines()
        number = next(i for i, line in enumerate(kept) if '"kind": "row"' in line and f'"name": "{name}"' in line)
        kept[number] = kept[number][:60]
        log.write_text('\n'.join(kept) + '\n')

    damage('eca')
    told = str(compare(resume=str(folder), progress=False))
    assert "1 run of 'eca' not shown" in told and f'--resume {folder} --operations ...' in told
    again = compare(resume=str(folder), operations='eca', progress=False)
    assert again['eca'].accuracies == whole['eca'].accuracies and 'not shown' not in str(again)
    damage('none')
    with pytest.raises(CheckpointError, match=r"says what row 'none' is, is damaged. .* --operations \.\.\."):
        compare(resume=str(folder), progress=False)
    with pytest.raises(OptionError, match=r"baseline 'nothing' is no row"):
        compare(resume=str(folder), baseline='nothing', progress=False)


def test_images_that_could_not_be_read_are_in_no_interval(tmp_path: Path) -> None:
    data = write_images(tmp_path / 'data')
    for name in ('0', '1', '2'):
        (data / 'validation' / 'cross' / f'{name}.png').write_text('no image')
    result = compare_small(data, tmp_path / 'run', operations='none,eca', skip_bad_images=True)
    assert result.num_images[1] == 12 and 'on these 12 validation images' in str(result)


def test_options_that_would_do_nothing_are_refused(images: Path, tmp_path: Path) -> None:
    for given in ({'tuning_fraction': 0.3}, {'lr_factors': (1.0, 3.0)}, {'search_seeds': 2}):
        with pytest.raises(OptionError, match=f"{next(iter(given))}: without search='lr'"):
            compare_small(images, tmp_path / 'run', **given)


def test_a_missing_package_is_no_refusal(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = calls.build_model

    def without_peft(asked: Any, num_classes: int) -> Any:
        if asked.operation == 'sem':
            raise MissingPackageError('needs peft. Do: pip install peft')
        return build(asked, num_classes)

    monkeypatch.setattr(calls, 'build_model', without_peft)
    with pytest.raises(MissingPackageError, match='pip install peft'):
        compare_small(images, tmp_path / 'run', operations='none,eca,sem')
    assert not (tmp_path / 'run').exists()


def test_a_run_that_is_too_large_for_the_memory_leaves_the_others_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, do_run = tmp_path / 'run', calls.do_run

    def failing(asked: Any, display: Any) -> dict[str, Any]:
        if asked.operation == 'none':
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB.')
        return do_run(asked, display)

    with monkeypatch.context() as patch:
        patch.setattr(calls, 'do_run', failing)
        result = compare_small(images, folder, operations='none,eca', seeds=1, search='lr', lr_factors=(1.0,))
    assert result.num_pending == 2 and [*result['eca'].accuracies] == [0]
    assert 'none, seed 0, try of learning rate 0.001 was left out: CUDA out of memory. It is tried again' in str(result)
    assert compare(resume=str(folder), progress=False).num_pending == 0


def test_costs_that_were_not_measured_are_so_where_they_are_asked_for(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    compare_small(images, folder, operations='none,eca', seeds=1, costs=False)
    assert not any(row.costs.step_seconds for row in compare(resume=str(folder), progress=False).rows if row.costs)
    rows = compare(resume=str(folder), costs=True, progress=False).rows
    assert [row.costs is not None and row.costs.step_ratio is not None for row in rows] == [True, True]
    length = len(lines(folder, 'costs'))
    compare(resume=str(folder), costs=True, progress=False)
    assert len(lines(folder, 'costs')) == length


@pytest.mark.parametrize('where', ['__init__', 'measure'])
def test_a_step_that_is_too_large_to_be_measured_costs_its_measurement_and_no_more(
    where: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB.')

    monkeypatch.setattr(calls.StepMeter, where, failing)
    result = compare_small(images, tmp_path / 'run', operations='none,eca', seeds=1, costs=True)
    assert [len(row.accuracies) for row in result.rows] == [1, 1] and not result.num_pending
    assert all(row.costs is not None and row.costs.step_ratio is None for row in result.rows)


def test_a_stopped_run_goes_on_where_weights_and_data_lie_by_now(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_small(images, tmp_path / 'whole', operations='none', seeds=1, weights=str(weights))
    data, file = shutil.copytree(images, tmp_path / 'images'), shutil.copy(weights, tmp_path / 'here.pth')
    folder = tmp_path / 'run'
    with stopped_after(8, monkeypatch), pytest.raises(StoppedError):
        compare_small(data, folder, operations='none', seeds=1, weights=str(file))
    assert list(folder.glob('runs/none*/checkpoints/step-*'))
    data, file = data.rename(tmp_path / 'moved'), Path(file).rename(tmp_path / 'there.pth')
    result = compare(resume=str(folder), data=str(data), weights=str(file), progress=False)
    assert result['none'].losses == whole['none'].losses


def test_the_log_tells_versions_and_ratios_to_another_row_are_not_shown(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    compare_small(images, folder, operations='none,eca', seeds=1, costs=True)
    (first, second), log = lines(folder, 'run'), Log(folder)
    assert first['versions'] == second['versions'] and f'timm {timm.__version__}' in first['versions']
    record = log.read()
    found = {row.name: row.costs for row in row_results(record, None, 0.001, 'eca', 15)}
    assert found['none'] is not None and found['none'].step_ratio is None and found['none'].macs
    log.append_all([('run', {**first, 'seed': 1, 'versions': 'sem_timm 9'})])
    result = compare(resume=str(folder), seeds=(0, 1), progress=False)
    assert f'Runs were made with different versions, {second["versions"]}; sem_timm 9: those' in str(result)
    with pytest.raises(NoMatchError, match=r"there is no row 'ecca'\. Close: eca"):
        result['ecca']
