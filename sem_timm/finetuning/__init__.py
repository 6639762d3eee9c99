"""Fine-tuning of patched models: timm's parts, run by accelerate, safe against every way a long run can end."""

from sem_timm.finetuning.calls import FinetuneResult, finetune
from sem_timm.finetuning.errors import CheckpointError, DataError, DivergedError, StoppedError, WriteError
from sem_timm.finetuning.options import FinetuneOptions

__all__ = [
    'CheckpointError',
    'DataError',
    'DivergedError',
    'FinetuneOptions',
    'FinetuneResult',
    'StoppedError',
    'WriteError',
    'finetune',
]
