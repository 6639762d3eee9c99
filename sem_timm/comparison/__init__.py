"""Operations compared on one's own images: paired runs, intervals and costs."""

from sem_timm.comparison.calls import compare
from sem_timm.comparison.costs import Costs
from sem_timm.comparison.options import CompareOptions
from sem_timm.comparison.result import ComparisonResult, RowResult
from sem_timm.comparison.rows import Row
from sem_timm.comparison.statistics import Difference

__all__ = ['CompareOptions', 'ComparisonResult', 'Costs', 'Difference', 'Row', 'RowResult', 'compare']
