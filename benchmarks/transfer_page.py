"""docs/transfer.md, from the rows of transfer.py."""

from __future__ import annotations

from typing import Any


def page(rows: list[dict[str, Any]]) -> str:
    """The page."""
    return repr(rows)
