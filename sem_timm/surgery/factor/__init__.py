"""Where a constant factor per channel can go in a model: into which parameters it is multiplied."""

from sem_timm.surgery.factor.places import FactorPlace, factor_places
from sem_timm.surgery.factor.scope import Multiplied

__all__ = ['FactorPlace', 'Multiplied', 'factor_places']
