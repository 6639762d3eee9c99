"""`finetune`: from options to a trained model, in one call."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_model
from torch import nn

from sem_timm.errors import ModelError, OptionError, closest
from sem_timm.finetuning.checkpoints import Checkpoints, State, find_checkpoint
from sem_timm.finetuning.datasets import length_of
from sem_timm.finetuning.engine import Trainer
from sem_timm.finetuning.errors import CheckpointError
from sem_timm.finetuning.files import (
    OPTIONS,
    PATCH,
    RESULT,
    WEIGHTS,
    explained,
    remove_leftovers,
    write_text,
    write_whole,
)
from sem_timm.finetuning.giving_back import given_back_on_error
from sem_timm.finetuning.logs import start_logs
from sem_timm.finetuning.lora import merge_adapters
from sem_timm.finetuning.models import inserted_parameters, operation_name, save_if_patch
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.parts import Parts, build_parts, create_accelerator
from sem_timm.finetuning.progress import OpenDisplay, ProgressDisplay
from sem_timm.finetuning.result import FinetuneResult
from sem_timm.finetuning.stopping import StopRequest
from sem_timm.surgery import patched_modules

_MAY_CHANGE = {'resume', 'stop_at', 'progress', 'workers', 'keep', 'checkpoint_every', 'skip_bad_images'}
# Remedies for a run that diverged: with them it goes on, but is no longer the run that was begun.
_REMEDIES = {'lr', 'min_lr', 'new_lr_scale', 'clip'}


def finetune(
    options: FinetuneOptions | None = None, *, network: nn.Module | None = None, **given: Any
) -> FinetuneResult:
    """Trains a model with an operation applied to it; by default a small one with SEM, on handwritten digits.

    Works under ``torchrun`` and ``accelerate launch`` unchanged: then all processes call it.

    Args:
        options: All options; or give them by name.
        network: A model to train, instead of one that timm creates by name; it must have a head for the data. If it
            has been operated on, no operation is applied. To train it with its base frozen it needs, as timm's models
            have, a method ``get_classifier()`` that returns the head.
        **given: Fields of `FinetuneOptions`, in place of those of ``options``.

    Returns:
        The trained model, and what was gained.

    Raises:
        SemTimmError: OptionError, DataError, CheckpointError or WriteError, each saying what to do; DivergedError
            for a loss that is not finite; StoppedError after Ctrl-C or SIGTERM, when the state is saved.
    """
    return run_finetuning(_asked(options, given), given, network, ProgressDisplay)


def run_finetuning(
    options: FinetuneOptions, given: dict[str, Any], network: nn.Module | None, open_display: OpenDisplay
) -> FinetuneResult:
    """`finetune`, shown by a display of the caller's.

    Args:
        options: All options.
        given: Those among them that were given by name.
        network: As there.
        open_display: Makes the display from the number of updates, of epochs, and whether to show anything.
    """
    began = time.perf_counter()
    asked, checkpoint, changed = _resumed(options, given)
    accelerator = create_accelerator(asked)
    with StopRequest(patient=accelerator.num_processes > 1) as stop:
        with given_back_on_error(network):
            parts = build_parts(asked, accelerator, network)
            run = _run_folder(asked, parts)
            state = State(num_processes=accelerator.num_processes)
            if checkpoint is None:
                _prepare_folder(run, asked, accelerator)
            else:
                state = _load(parts, checkpoint, asked if changed else None)
            start_logs(accelerator, run, asked.trackers, state.step)
        total = asked.epochs * parts.training.num_updates
        with open_display(total, asked.epochs, asked.progress and accelerator.is_main_process) as display:
            display.say(describe(parts, asked, run, state))
            if changed:
                display.say(f'from here on it is another run than the one that was begun: {changed}')
            Trainer(asked, parts, state, run, stop, display).train()
    return _finish(parts, state, asked, run, time.perf_counter() - began)


def options_of_run(**given: Any) -> FinetuneOptions:
    """All options of the run that `finetune` would do with some; of one that is resumed, those it has.

    Raises:
        SemTimmError: As `finetune`.
    """
    return _resumed(_asked(None, given), given)[0]


def _asked(options: FinetuneOptions | None, given: dict[str, Any]) -> FinetuneOptions:
    known = [option.name for option in fields(FinetuneOptions)]
    for name in given:
        if name not in known:
            raise OptionError(f'option {name!r} is unknown. {closest(name, known)}')
    return replace(options or FinetuneOptions(), **given)


def _resumed(options: FinetuneOptions, given: dict[str, Any]) -> tuple[FinetuneOptions, Path | None, str]:
    """The options of the run that is to go on, the checkpoint to go on from, and what is no longer as it was."""
    if options.resume is None:
        return options, None, ''
    run, checkpoint = find_checkpoint(Path(options.resume))
    given = {**options.given(), **{name: getattr(options, name) for name in given}}  # be it a default
    fixed = [name for name in given if name not in _MAY_CHANGE | _REMEDIES]
    if fixed:
        raise OptionError(
            f'a resumed run has its options already; leave out {", ".join(fixed)}. What may change: '
            f'{", ".join(sorted((_MAY_CHANGE | _REMEDIES) - {"resume"}))}.'
        )
    try:
        saved = FinetuneOptions.from_json((run / OPTIONS).read_text(encoding='utf-8'))
    except (OSError, OptionError) as error:
        raise CheckpointError(f'the options of the run cannot be read from {run / OPTIONS}: {error}') from error
    asked = replace(saved, **{'stop_at': None, **given, 'output': str(run)})
    remedies = [name for name in sorted(_REMEDIES) if getattr(saved, name) != getattr(asked, name)]
    changed = [f'{name} {getattr(asked, name)} instead of {getattr(saved, name)}' for name in remedies]
    return asked, checkpoint, ', '.join(changed)


def _run_folder(options: FinetuneOptions, parts: Parts) -> Path:
    """The folder of a run, which all processes agree on."""
    label = options.model.rsplit('/', 1)[-1].replace(':', '-')
    name = f'runs/{label}-{operation_name(parts.bare_model).replace(" ", "-")}-{time.strftime("%Y%m%d-%H%M%S")}'
    names = [options.output or name]
    if parts.accelerator.num_processes > 1:
        broadcast_object_list(names)
    return Path(names[0])


def _prepare_folder(run: Path, options: FinetuneOptions, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        if run.exists() and not run.is_dir():
            raise OptionError(f'{run} is a file; name a new folder for the run: --output FOLDER.')
        if run.exists() and any(run.iterdir()):
            way = f'continue it with --resume {run}, or name' if Checkpoints(run).all() else 'name'
            raise OptionError(f'{run} exists and is not empty; {way} another --output.')
        with explained(run):
            run.mkdir(parents=True, exist_ok=True)
        write_text(run / OPTIONS, options.to_json())
    accelerator.wait_for_everyone()


def _load(parts: Parts, checkpoint: Path, changed: FinetuneOptions | None) -> State:
    """Gives the parts their state, and notes options that are no longer those of the run."""
    run, groups = checkpoint.parents[1], [dict(group) for group in parts.optimizer.param_groups]
    checkpoints = Checkpoints(run)
    state = checkpoints.load(parts.accelerator, checkpoint)
    if parts.accelerator.is_main_process:
        remove_leftovers(run)
        checkpoints.go_on_from(checkpoint, state)
    parts.accelerator.wait_for_everyone()
    if state.step == 0:
        parts.optimizer.state.clear()  # see where it is saved
    if changed is not None:
        for group, told in zip(parts.optimizer.param_groups, groups):  # which come back with the state
            group.update(lr_scale=told['lr_scale'], name=told['name'])
        if parts.accelerator.is_main_process:
            write_text(run / OPTIONS, replace(changed, resume=None, stop_at=None).to_json())
    return state


def describe(parts: Parts, options: FinetuneOptions, run: Path, state: State) -> str:
    """What is about to be trained, on what, and where it is written."""
    model, data = parts.bare_model, parts.data
    new, all_parameters = inserted_parameters(model).values(), list(model.parameters())
    trained = sum(p.numel() for group in parts.optimizer.param_groups for p in group['params'])
    kept = ' (held out of the training images)' if data.held_out else ''
    lines = [
        f'{options.model} with operation {operation_name(model)} at '
        f'{len({m.name for m in patched_modules(model)})} modules: '
        f'{sum(p.numel() for p in all_parameters):,} parameters, {sum(p.numel() for p in new):,} of them new, '
        f'{trained:,} trained',
        f'{options.data}: {length_of(data.train)} images for training, {length_of(data.validation)} for validation'
        f'{kept}, {data.num_classes} classes',
        *(f'  {group["name"]}: {sum(p.numel() for p in group["params"]):,}' for group in parts.optimizer.param_groups),
        f'{run}: ' + (f'goes on after step {state.step}' if state.step else 'new run'),
    ]
    return '\n'.join(lines)


def _finish(parts: Parts, state: State, options: FinetuneOptions, run: Path, seconds: float) -> FinetuneResult:
    model, data, accelerator = parts.final_model(), parts.data, parts.accelerator
    merge_adapters(model)
    new, last, best = inserted_parameters(model).values(), state.history[-1], state.best or state.history[-1]
    result = FinetuneResult(
        model=model.eval(),
        options=options,
        operation=operation_name(model),
        folder=run,
        before=state.before or 0.0,
        after=last['accuracy'],
        best=best['accuracy'],
        best_checkpoint=Checkpoints(run).best(),
        num_images=(length_of(data.train), round(last.get('images', length_of(data.validation)))),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_new_parameters=sum(p.numel() for p in new),
        num_trained_parameters=sum(p.numel() for group in parts.optimizer.param_groups for p in group['params']),
        num_steps=state.step,
        seconds=seconds,
        bad_images=tuple(sorted({*state.bad_images, *data.bad_images()})),
        classes=data.classes,
        history=tuple(state.history),
    )
    if accelerator.is_main_process:
        write_whole(run / WEIGHTS, lambda path: save_model(model, str(path)))
        write_text(run / RESULT, json.dumps(result.to_dict(), indent=1))
        _save_patch(model, options, run / PATCH)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return result


def _save_patch(model: nn.Module, options: FinetuneOptions, folder: Path) -> None:
    """Saves what was trained, where that is a patch and a file can hold it."""
    try:
        with explained(folder):
            save_if_patch(model, options, folder)
    except ModelError as error:  # such as of an operation that has no name; the run has its weights
        warnings.warn(f'{folder} was not written: {error}', stacklevel=4)
