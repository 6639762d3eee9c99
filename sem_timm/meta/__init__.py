"""Models without weights: copies on the meta device, and what operations do there to shapes, memory and layouts."""

from sem_timm.meta.layout import Layout, layout_of, set_layout
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.probing import Call, Probe, probe
from sem_timm.meta.skeleton import dtype_of, filled, shadow, weightless
from sem_timm.meta.state import State

__all__ = [
    'Call',
    'Layout',
    'LayoutMode',
    'Probe',
    'State',
    'dtype_of',
    'filled',
    'layout_of',
    'probe',
    'set_layout',
    'shadow',
    'weightless',
]
