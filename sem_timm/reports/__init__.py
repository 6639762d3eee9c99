"""Looking inside: what SEM decides, where external memories look, what a model costs, why a module is refused.

Models stay as they are.
"""

from sem_timm.reports.attention_map import AttentionMap, attention_map
from sem_timm.reports.costs import Cost
from sem_timm.reports.decisions import Decisions, decisions
from sem_timm.reports.explanation import Explanation, explain
from sem_timm.reports.findings import Finding
from sem_timm.reports.listing import Line
from sem_timm.reports.reason import Reason
from sem_timm.reports.summary import StageCost, Summary, summary

__all__ = [
    'AttentionMap',
    'Cost',
    'Decisions',
    'Explanation',
    'Finding',
    'Line',
    'Reason',
    'StageCost',
    'Summary',
    'attention_map',
    'decisions',
    'explain',
    'summary',
]
