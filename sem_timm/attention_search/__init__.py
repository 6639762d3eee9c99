"""Which blocks of a trained model keep their softmax attention, found by trying."""

from sem_timm.attention_search.plan import FrontPoint, SearchedPlan
from sem_timm.attention_search.search import search

__all__ = ['FrontPoint', 'SearchedPlan', 'search']
