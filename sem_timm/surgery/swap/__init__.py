"""Another attention in place of a module's own: cores are found, replaced in their graphs, checked and matched."""

from sem_timm.surgery.swap.match import match_scales
from sem_timm.surgery.swap.place import NoCore, Swapper, may_attend

__all__ = ['NoCore', 'Swapper', 'match_scales', 'may_attend']
