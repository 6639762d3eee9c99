"""Which architectures of timm have self-attention that can be replaced: data made by benchmarks/attention_table.py."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sem_timm.registry.variant_operation import VariantOperation

_FILE = Path(__file__).with_name('attention_sites.json')

# The operations that were planned. Cores of all names go to the places of the first, whole modules to the second. The
# third counts only where the plan needs no training: with position biases or masks of windows there is no variant.
COLUMNS = ('external', 'eamlp', 'monarch')


@dataclass(frozen=True)
class AttentionTable:
    """Numbers of sites, counted in plans on the meta device.

    Attributes:
        timm: The version of timm the plans were made with.
        sites: For every architecture of that version, the numbers of sites in the order of `COLUMNS`.
    """

    timm: str
    sites: dict[str, list[int]]

    def count(self, architecture: str, operation: VariantOperation) -> int | None:
        """The number of sites of an architecture, or None if the table does not know it."""
        counts = self.sites.get(architecture)
        return None if counts is None else counts[COLUMNS.index(operation.name) if operation.name in COLUMNS else 0]


def read_table(file: Path = _FILE) -> AttentionTable:
    """Reads a table, by default the one that is shipped."""
    return AttentionTable(**json.loads(file.read_text(encoding='utf-8')))


def write_table(table: AttentionTable, file: Path = _FILE) -> None:
    """Writes a table, by default the one that is shipped."""
    text = json.dumps(asdict(table), indent=1)
    file.write_text(text.replace('[\n   ', '[').replace(',\n   ', ', ').replace('\n  ]', ']') + '\n', encoding='utf-8')
