"""A swapped model learns from its original, which is still in it, what the original's attention did."""

from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.result import Stage, TransferResult
from sem_timm.attention_transfer.stages import initialize_memories, match_layers, transfer

__all__ = ['Stage', 'TransferOptions', 'TransferResult', 'initialize_memories', 'match_layers', 'transfer']
