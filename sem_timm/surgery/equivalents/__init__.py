"""Forwards and functions that no graph shows, spelled out in operations that one does."""

from sem_timm.surgery.equivalents.attention import encoder_layer
from sem_timm.surgery.equivalents.table import attributes_of, equivalent_of, forward_of

__all__ = ['attributes_of', 'encoder_layer', 'equivalent_of', 'forward_of']
