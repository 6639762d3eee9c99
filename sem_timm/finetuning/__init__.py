"""Fine-tuning of patched models: timm's parts, run by accelerate, safe against every way a long run can end."""

from sem_timm.finetuning.calls import finetune
from sem_timm.finetuning.errors import CheckpointError, DataError, DivergedError, StoppedError, WriteError
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.result import FinetuneResult
from sem_timm.finetuning.runs import Run, open_run

__all__ = [
    'CheckpointError',
    'DataError',
    'DivergedError',
    'FinetuneOptions',
    'FinetuneResult',
    'Run',
    'StoppedError',
    'WriteError',
    'finetune',
    'open_run',
]
