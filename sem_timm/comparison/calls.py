"""`compare`: rows with the same recipe, images and base weights, in paired runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sem_timm.comparison.costs import Costs, StepMeter, build_model, count_costs
from sem_timm.comparison.display import ComparisonDisplay, label
from sem_timm.comparison.log import FINISHED, Entry, Log, Record, RunKey, claimed, way_on
from sem_timm.comparison.picture import draw
from sem_timm.comparison.result import ComparisonResult, row_results
from sem_timm.comparison.rows import Row
from sem_timm.comparison.runs import RUNS, do_run, folder_of, left_runs, lock_of, pending_runs, run_options
from sem_timm.comparison.setting import Setting, open_setting
from sem_timm.comparison.tables import as_csv, as_latex, as_markdown
from sem_timm.errors import MissingPackageError, OptionError, SemTimmError
from sem_timm.finetuning import StoppedError
from sem_timm.finetuning.files import write_text, write_whole
from sem_timm.finetuning.parts import create_accelerator
from sem_timm.persistence.save import versions

_WAIT = 2.0  # seconds, for tries that another process is about

T = TypeVar('T')


def compare(**given: Any) -> ComparisonResult:
    """Compares operations, places and ways of training on one's own images, by runs that differ in nothing else.

    Runs with the same seed have the same images in the same order with the same augmentation, and the same initial
    weights but for what is new. All rows have one recipe, or as many tries of the learning rate each, which are judged
    on images held out of the training images. Accuracy is that of the last epoch. Works under ``torchrun`` and
    ``accelerate launch`` unchanged: then all processes call it.

    Args:
        **given: Fields of `CompareOptions`, and those fields of `FinetuneOptions` that all runs share, such as
            ``model``, ``data`` and ``epochs``. Without any, a small network is trained on a few handwritten digits.

    Returns:
        The rows with accuracies, differences and costs; printing it shows a table with what can be told. The folder has
        the log, and the tables as CSV, JSON, Markdown, LaTeX and a picture.

    Raises:
        SemTimmError: OptionError, DataError, CheckpointError or WriteError, each saying what to do; StoppedError after
            Ctrl-C or SIGTERM in a run. What was finished is in the log, and goes on with ``resume``.
    """
    return run_comparison(given)


def run_comparison(given: dict[str, Any], command: str | None = None) -> ComparisonResult:
    """`compare`, with the command that was typed for the record."""
    setting = open_setting(given)
    accelerator = create_accelerator(setting.base)
    setting = replace(setting, folder=Path(_agreed(accelerator, lambda: str(setting.folder))))
    with ComparisonDisplay(setting.options.progress and accelerator.is_main_process) as display:
        log = Log(setting.folder)
        if accelerator.is_main_process:
            _prepare(setting, log, accelerator, display, command)
        record = _agreed(accelerator, log.read)
        display.begin(left_runs(record, setting.search, setting.base.lr, setting.seeds))
        with _stops_told(setting):
            too_large = _do_runs(setting, log, accelerator, display)
    record = _agreed(accelerator, log.read)
    result = _result(setting, record, too_large)
    if accelerator.is_main_process and os.access(setting.folder, os.W_OK):  # else it was finished, and is only read
        write_files(result)
    accelerator.wait_for_everyone()
    return result


def _agreed(accelerator: Accelerator, tell: Callable[[], T]) -> T:
    """What the first process tells, in all of them."""
    told = [tell() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    value: Any = told[0]
    return value


def _prepare(
    setting: Setting, log: Log, accelerator: Accelerator, display: ComparisonDisplay, command: str | None
) -> None:
    """Plans all rows, measures what they cost, and begins or extends the log."""
    known = setting.record or Record({})
    ordered = sorted(setting.rows, key=lambda row: row.name != setting.baseline)
    missing = [row for row in ordered if row.name not in known.refused and _lacks_costs(setting, known, row)]
    costs, refused = _costs_of(setting, missing, accelerator, display) if missing else ({}, {})
    if len(setting.rows) > 1 and len(setting.rows) - len({**known.refused, **refused}) < 2:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in {**known.refused, **refused}.items())
        raise OptionError(f'nothing is left to compare {setting.baseline} with. {reasons}')
    new = [row for row in setting.rows if row.name not in known.rows]
    entries: list[Entry] = [('row', {'row': row.to_dict(), 'refused': refused.get(row.name)}) for row in new]
    entries += [('costs', {'row': name, 'costs': found.to_dict()}) for name, found in costs.items()]
    if setting.record is None:
        told = {'machine': setting.machine, 'seeds': setting.seeds, 'baseline': setting.baseline, 'command': command}
        log.begin(setting.recipe, setting.data, entries, **told)
    elif entries:
        log.read()
        log.append_all(entries)


def _lacks_costs(setting: Setting, known: Record, row: Row) -> bool:
    """Whether costs of a row are still to be found: it is new, its baseline is another, or it was not measured."""
    found = known.costs.get(row.name, {})
    is_unmeasured = setting.costs_asked and found.get('step_seconds') is None
    return row.name not in known.rows or found.get('baseline') != setting.baseline or is_unmeasured


def _costs_of(
    setting: Setting, rows: list[Row], accelerator: Accelerator, display: ComparisonDisplay
) -> tuple[dict[str, Costs], dict[str, str]]:
    """What rows cost, and why others are refused."""
    display.say(f'planning {len(rows)} rows' + (', and measuring what they cost' if setting.options.costs else ''))
    costs: dict[str, Costs] = {}
    refused: dict[str, str] = {}
    base_row = next(row for row in setting.rows if row.name == setting.baseline)
    base_options = base_row.applied_to(setting.base)
    num_classes = setting.data['num_classes']
    base_model = build_model(base_options, num_classes)  # an error here is one of model, data or recipe
    counted_base = count_costs(base_options, base_model, setting.baseline)
    meter = None
    if setting.options.costs:
        with _told_if_too_large(display, setting.baseline):
            meter = StepMeter(base_options, base_model, accelerator.device)
    for row in rows:
        options = row.applied_to(setting.base)
        try:
            is_base = row.name == setting.baseline
            model = base_model if is_base else build_model(options, num_classes)
            counted = counted_base if is_base else count_costs(options, model, setting.baseline)
            costs[row.name] = counted
            if meter is not None:
                with _told_if_too_large(display, row.name):
                    costs[row.name] = meter.measure(counted, options, model)
                    if is_base:  # what it takes over itself is noise
                        costs[row.name] = replace(costs[row.name], step_ratio=1.0, peak_ratio=1.0)
        except MissingPackageError:  # with it the row can be run
            raise
        except SemTimmError as error:
            refused[row.name] = ' '.join(str(error).split())
    return costs, refused


@contextmanager
def _told_if_too_large(display: ComparisonDisplay, name: str) -> Iterator[None]:
    """Leaves a step unmeasured that does not fit into memory beside the one of the baseline."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        display.say(f'{name}: time and memory of a step are not measured. {str(error).partition(".")[0]}')


def _do_runs(setting: Setting, log: Log, accelerator: Accelerator, display: ComparisonDisplay) -> dict[RunKey, str]:
    """Does all runs of this process, one after the other; tells those for which the memory was too small."""
    too_large: dict[RunKey, str] = {}
    base = replace(setting.base, progress=setting.options.progress)
    while True:
        with _next_run(setting, log, accelerator, too_large) as found:
            if found is None:
                return too_large
            key, row = found
            run = folder_of(setting.folder, key)
            options = run_options(base, row, key, setting.search, run)
            try:
                outcome = do_run(options, display.for_run(key))
            except torch.cuda.OutOfMemoryError as error:
                if accelerator.num_processes > 1:  # of which the others wait
                    raise
                too_large[key] = str(error).partition('.')[0]
                display.say(f'{label(key)}: {too_large[key]}')
                continue
            if accelerator.is_main_process:
                made_with = ', '.join(f'{name} {version}' for name, version in versions().items())
                made = {'versions': made_with, 'date': time.strftime('%Y-%m-%d')}
                log.append('run', row=key.row, seed=key.seed, lr=key.lr, is_try=key.is_try, **outcome, **made)
                if not setting.options.keep_runs:
                    shutil.rmtree(run, ignore_errors=True)
                display.finish(key, outcome, left_runs(log.read(), setting.search, setting.base.lr, setting.seeds))
            accelerator.wait_for_everyone()


@contextmanager
def _stops_told(setting: Setting) -> Iterator[None]:
    """Says how a comparison goes on that a signal stops, be it between two runs."""
    way = f'finished runs are in the log, and it goes on with: sem-timm compare {way_on(setting.folder)}'
    try:
        yield
    except StoppedError as error:
        raise StoppedError(error.exit_code - 128, f'within a run; {way}') from error
    except KeyboardInterrupt as error:
        raise StoppedError(signal.SIGINT, f'between two runs; {way}') from error
    except SystemExit as error:  # what the command makes of SIGTERM
        if error.code != 128 + signal.SIGTERM:
            raise
        raise StoppedError(signal.SIGTERM, f'between two runs; {way}') from error


@contextmanager
def _next_run(
    setting: Setting, log: Log, accelerator: Accelerator, left_out: Collection[RunKey]
) -> Iterator[tuple[RunKey, Row] | None]:
    """The next run and its row, which another process may have added; None if there is none left for this one.

    It is claimed as long as the context lasts.
    """
    with ExitStack() as claims:
        yield _agreed(accelerator, lambda: _claim(setting, log, claims, left_out))


def _claim(setting: Setting, log: Log, claims: ExitStack, left_out: Collection[RunKey]) -> tuple[RunKey, Row] | None:
    while True:
        record = log.read()
        runs = pending_runs(record, setting.search, setting.base.lr, setting.seeds)
        pending = [key for key in runs if key not in left_out]
        for key in pending:
            file = lock_of(setting.folder, key)
            with ExitStack() as stack:
                if not stack.enter_context(claimed(file)):
                    continue
                stack.callback(file.unlink, missing_ok=True)
                # Between reading the log and claiming it, another process may have finished it.
                if key not in log.read().runs:
                    claims.push(stack.pop_all())
                    return key, record.rows[key.row]
        if not any(key.is_try for key in pending):
            return None
        time.sleep(_WAIT)  # others are about the tries that our runs depend on


def _result(setting: Setting, record: Record, too_large: Mapping[RunKey, str]) -> ComparisonResult:
    base, search = setting.base, setting.search
    seeds = {*setting.seeds, *record.begun['seeds'], *(key.seed for key in record.runs if not key.is_try)}
    finished = [run for key, run in record.runs.items() if not key.is_try and run['outcome'] == FINISHED]
    # Of images that cannot be read, some are not measured.
    num_measured = min((run['images'][1] for run in finished if 'images' in run), default=setting.num_images[1])
    without_row = Counter(key.row for key in record.runs if key.row not in record.rows and not key.is_try)
    rows = row_results(record, search, base.lr, setting.baseline, num_measured)
    told = {
        'model': base.model,
        'data': base.data,
        'num_classes': setting.data['num_classes'],
        'epochs': base.epochs,
        'lr': base.lr,
        'command': record.begun.get('command'),
    }
    return ComparisonResult(
        rows=tuple(rows),
        baseline=setting.baseline,
        folder=setting.folder,
        told=told,
        num_images=(setting.num_images[0], num_measured),
        search=search,
        num_pending=left_runs(record, search, base.lr, sorted(seeds)),
        num_damaged=record.num_damaged,
        versions=tuple(sorted({run['versions'] for run in record.runs.values() if 'versions' in run})),
        without_row=without_row,
        too_large={label(key): why for key, why in too_large.items()},
    )


def write_files(result: ComparisonResult) -> None:
    """Writes the tables into the folder of a comparison, each as a whole or not at all.

    Raises:
        WriteError: If one cannot be written.
    """
    folder = result.folder
    with suppress(OSError):  # unless a process is about a run
        (folder / RUNS).rmdir()
    write_text(folder / 'results.json', json.dumps(result.to_dict(), indent=1))
    write_text(folder / 'results.csv', as_csv(result))
    write_text(folder / 'results.md', as_markdown(result))
    write_text(folder / 'results.tex', as_latex(result))
    with suppress(ImportError):  # the picture alone needs matplotlib
        write_whole(folder / 'results.png', lambda path: draw(result, path))
