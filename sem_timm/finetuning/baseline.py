"""The same recipe without the operation, to compare with."""

from __future__ import annotations

import shutil
from dataclasses import replace

from accelerate import PartialState
from timm.models import split_model_name_tag

from sem_timm.errors import OptionError
from sem_timm.finetuning.calls import finetune
from sem_timm.finetuning.checkpoints import Checkpoints
from sem_timm.finetuning.models import is_pretrained
from sem_timm.finetuning.options import NO_OPERATION, FinetuneOptions
from sem_timm.finetuning.result import FinetuneResult
from sem_timm.registry import base_architecture, base_arguments

_FOLDER = 'without_operation'


def options_without(options: FinetuneOptions) -> FinetuneOptions:
    """The same options without the operation; of a variant those of its base.

    Raises:
        OptionError: If there is nothing to leave out.
    """
    name, tag = split_model_name_tag(options.model)
    base = base_architecture(name)
    if options.operation == NO_OPERATION and base == name:
        raise OptionError("operation='none' leaves nothing to compare with.")
    plain = replace(options, operation=NO_OPERATION, target=None, exclude=None, operation_options={}, resume=None)
    if base == name:
        return plain
    return replace(
        plain,
        model=f'{base}.{tag}' if tag else base,
        model_options=base_arguments(name, options.model_options),
        pretrained=is_pretrained(options),  # the base may have weights where its variant begins without
    )


def finetune_without(result: FinetuneResult) -> FinetuneResult:
    """Trains the model of a result once more, with the same options but without the operation.

    The run is in a folder inside that of the result; if a part of it is there already, it goes on from there.

    Raises:
        OptionError: If there is nothing to leave out, or a model from the hub has the operation in it.
        SemTimmError: As `finetune`.
    """
    folder = result.folder / _FOLDER
    options = replace(options_without(result.options), output=str(folder))
    architecture = (getattr(result.model, 'pretrained_cfg', None) or {}).get('architecture') or ''
    if base_architecture(architecture) not in (architecture, split_model_name_tag(options.model)[0]):
        raise OptionError(
            f'{options.model} is a {architecture}, so that {result.operation} cannot be left out; to compare, give '
            f'{base_architecture(architecture)} and --operation.'
        )
    if Checkpoints(folder).all():
        return finetune(FinetuneOptions(resume=str(folder), progress=result.options.progress))
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its first checkpoint
    return finetune(options)
