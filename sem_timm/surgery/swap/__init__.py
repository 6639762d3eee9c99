"""Another attention in place of a module's own: cores are found, replaced in their graphs, checked and matched."""

from sem_timm.surgery.swap.match import match_scales
from sem_timm.surgery.swap.place import NoCore, Swapper, attention_modules, may_attend
from sem_timm.surgery.swap.rehearsal import Aftermath, rehearse_swap
from sem_timm.surgery.swap.verify import verify_swap

__all__ = [
    'Aftermath',
    'NoCore',
    'Swapper',
    'attention_modules',
    'match_scales',
    'may_attend',
    'rehearse_swap',
    'verify_swap',
]
