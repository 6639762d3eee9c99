"""Another attention in place of a module's own: cores are found, replaced in their graphs, and compared."""

from sem_timm.surgery.swap.place import NoCore, Swapper, may_attend

__all__ = ['NoCore', 'Swapper', 'may_attend']
