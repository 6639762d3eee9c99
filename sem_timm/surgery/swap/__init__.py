"""Another attention in place of a module's own: cores are found, replaced in their graphs, and compared."""

from sem_timm.surgery.swap.cores import Core, NotACore, judged_softmaxes
from sem_timm.surgery.swap.place import NoCore, Swapper, may_attend
from sem_timm.surgery.swap.queries import heads_of

__all__ = ['Core', 'NoCore', 'NotACore', 'Swapper', 'heads_of', 'judged_softmaxes', 'may_attend']
