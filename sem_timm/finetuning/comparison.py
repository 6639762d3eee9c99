"""The same recipe without the operation, to compare with."""

from __future__ import annotations

from dataclasses import replace

from sem_timm.errors import OptionError
from sem_timm.finetuning.calls import FinetuneResult, finetune
from sem_timm.finetuning.checkpoints import Checkpoints
from sem_timm.finetuning.options import NO_OPERATION, FinetuneOptions

_FOLDER = 'without_operation'


def finetune_without(result: FinetuneResult) -> FinetuneResult:
    """Trains the model of a result once more, with the same options but without the operation.

    The run is in a folder inside that of the result; if a part of it is there already, it goes on from there.

    Raises:
        OptionError: If the operation is a part of the model's name, such as resnet50_sem, and cannot be left out.
        SemTimmError: As `finetune`.
    """
    if result.options.operation == NO_OPERATION:
        raise OptionError("operation='none' leaves nothing to compare with.")
    folder = result.folder / _FOLDER
    if Checkpoints(folder).all():
        return finetune(FinetuneOptions(resume=str(folder), progress=result.options.progress))
    options = replace(
        result.options,
        operation=NO_OPERATION,
        target=None,
        exclude=None,
        operation_options={},
        resume=None,
        output=str(folder),
    )
    without = finetune(options)
    if without.num_new_parameters:
        raise OptionError(f'{options.model} has the operation in its name; give its base and --operation instead.')
    return without
