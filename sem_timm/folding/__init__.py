"""Gates that became constants, folded into the layers before them: timm's plain network is left."""

from sem_timm.folding.fold import fold_gates
from sem_timm.folding.result import FoldResult, GateFold

__all__ = ['FoldResult', 'GateFold', 'fold_gates']
