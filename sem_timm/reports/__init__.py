"""Looking inside: what SEM decides, where external memories look, what a model costs. Models stay as they are."""

from sem_timm.reports.attention_map import AttentionMap, attention_map
from sem_timm.reports.costs import Cost
from sem_timm.reports.decisions import Decisions, decisions
from sem_timm.reports.summary import StageCost, Summary, summary

__all__ = [
    'AttentionMap',
    'Cost',
    'Decisions',
    'StageCost',
    'Summary',
    'attention_map',
    'decisions',
    'summary',
]
