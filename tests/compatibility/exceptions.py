"""The cells of the matrix that do not apply or cannot work, and why: all of them, and only here."""

from __future__ import annotations

from dataclasses import dataclass

from tests.compatibility.families import OPERATIONS
from tests.compatibility.twins import UnpatchedFails


@dataclass(frozen=True)
class _Exception:
    capability: str
    columns: tuple[str, ...]
    reason: str
    operations: tuple[str, ...] = OPERATIONS

    def covers(self, capability: str, operation: str, column: str) -> bool:
        return self.capability == capability and operation in self.operations and column in self.columns


@dataclass(frozen=True)
class DoesNotApply(_Exception):
    """There is nothing to test.

    Attributes:
        lacks: The attribute that the models of these columns do not have.
    """

    lacks: str = ''


@dataclass(frozen=True)
class CannotWork(_Exception):
    """The test fails.

    Attributes:
        raises: With this error: `UnpatchedFails` where timm's own model fails as well.
    """

    raises: type[BaseException] = UnpatchedFails


EXCEPTIONS: tuple[DoesNotApply | CannotWork, ...] = ()
