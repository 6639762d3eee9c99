"""What a plan is: sites and refusals of one operation in one model, to look at and to apply."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sem_timm.errors import OptionError
from sem_timm.meta.layout import Layout
from sem_timm.surgery.rewrite import Edit
from sem_timm.surgery.sites import AttentionSite, Insertion, Refusal, Site, Swap
from sem_timm.tables import table

if TYPE_CHECKING:
    from sem_timm.surgery.swap.original import Original
    from sem_timm.surgery.swap.rows import Rows


@dataclass(frozen=True, repr=False)
class Plan:
    """Sites of one operation in one model, ready to be applied.

    Prints as a table, iterates over its sites, and converts to plain data with `to_dict`.

    Attributes:
        operation: The configuration of the operation.
        model_name: Class of the model.
        input_size: Shape (C, H, W) of the probe.
        dtype: Type of the model.
        sites: The sites, in the order of ``named_modules``.
        refusals: Modules that cannot take the operation, with reasons.
        edits: The edit of each module, by name.
        model: The model.
        structure: Classes and shapes of the model when the plan was made.
        unread: Names of parameters that no longer reach the output; they stop requiring gradients.
        sliced: The rows that are read of each packed weight that is not read as a whole; the others get gradients of
            zero.
        computed: Names of modules that are still called though nobody reads their result, or all of it.
        originals: What the old attention of each module is computed by.
        layouts: The layouts of the arguments of each module whose forward has more cases than the one that was planned.
    """

    operation: Insertion | Swap
    model_name: str
    input_size: tuple[int, ...]
    dtype: torch.dtype
    sites: tuple[Site | AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    edits: dict[str, Edit] = field(repr=False)
    model: weakref.ref[nn.Module] = field(repr=False)
    structure: dict[str, Hashable] = field(repr=False)
    unread: tuple[str, ...] = ()
    sliced: dict[str, Rows] = field(default_factory=dict)
    computed: tuple[str, ...] = ()
    originals: dict[str, Original] = field(default_factory=dict, repr=False)
    layouts: dict[str, dict[str, tuple[Layout | bool, ...]]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def num_parameters(self) -> int:
        """Parameters that applying the plan adds."""
        return sum(site.num_parameters for site in self.sites)

    @property
    def swaps_attention(self) -> bool:
        """Whether the plan puts another attention in place of the old."""
        return isinstance(self.sites[0], AttentionSite)

    @property
    def needs_training(self) -> bool:
        """Whether the plan swaps attention for one that is not close to the old, or not without what is lost of it."""
        return self.swaps_attention and not (self._is_close and not self.losing_terms)

    @property
    def _is_close(self) -> bool:
        operation: Any = self.operation
        return self.swaps_attention and bool(operation.fidelity)

    @property
    def losing_terms(self) -> tuple[str, ...]:
        """Names of the sites where position biases, or masks of windows, go with the old core."""
        return tuple(site.name for site in self.sites if isinstance(site, AttentionSite) and site.loses_terms)

    def code(self, name: str) -> str:
        """Source of the forward that the block ``name`` will have.

        Raises:
            OptionError: If the plan has no such site.
        """
        if name not in self.edits:
            raise OptionError(f'{name!r} is not a site of this plan. It has: {", ".join(self.edits)}.')
        return self.edits[name].source

    def to_dict(self) -> dict[str, Any]:
        """The plan as data that `json.dumps` takes."""
        operation = self.operation
        return {
            'model': self.model_name,
            'operation': operation.to_dict() if hasattr(operation, 'to_dict') else repr(operation),
            'input_size': list(self.input_size),
            'identity': operation.is_identity,
            'num_parameters': self.num_parameters,
            'sites': [site.to_dict() for site in self.sites],
            'unread': list(self.unread),
            'sliced': {name: asdict(rows) for name, rows in self.sliced.items()},
            'computed': list(self.computed),
            'refusals': [asdict(refusal) for refusal in self.refusals],
        }

    def __repr__(self) -> str:
        columns = self.sites[0].columns
        rows = [site.row() for site in self.sites]
        lines = table(columns, rows, left=len(columns) - sum(name in _NUMBERS for name in columns))
        noun = 'site' if len(self) == 1 else 'sites'
        kept = 'the outputs stay bit for bit the same' if self.operation.is_identity else 'the outputs change'
        if self.swaps_attention:
            kept = 'the outputs change, and the model needs training'
            kept = kept if self.needs_training else 'the outputs stay close to the original, without training'
        size = ' x '.join(map(str, self.input_size))
        lines.append(f'{self.operation} on {self.model_name} at {size}: {len(self)} {noun}, ')
        lines[-1] += f'{self.num_parameters:,} new parameters; {kept}.'
        windowed = tuple(site.name for site in self.sites if isinstance(site, Site) and site.num_windows > 1)
        if windowed:
            lines.append(f'Pooled window by window, since the batch holds windows and not images: {_few(windowed)}.')
        if self._is_close and self.losing_terms:
            lines.append(f'Position biases, or masks of windows, go with the old attention: {_few(self.losing_terms)}.')
        if self.unread:
            lines.append(f'No longer read: {len(self.unread)} parameters, which stop requiring gradients.')
        if self.computed:
            lines.append(f'Still computed, in whole or in part for nobody: {_few(self.computed)}.')
        if self.refusals:
            lines += ['Refused:', *(f'  {r.name} ({r.class_name}): {r.reason}' for r in self.refusals)]
        return '\n'.join(lines)


def _few(names: tuple[str, ...]) -> str:
    """Some names and how many more there are."""
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(names[:3]) + more


_NUMBERS = ('channels', 'heads', 'tokens', 'new parameters')
