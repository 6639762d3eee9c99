"""How the old attention of a swapped module is computed, and what it gives on real inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from sem_timm.surgery.effects import needed_for
from sem_timm.surgery.evaluate import Partial, run_part
from sem_timm.surgery.reading import Reading
from sem_timm.surgery.swap.cores import Core


@dataclass(frozen=True)
class Computed:
    """What went into an old core and came out of it.

    Attributes:
        query: The queries, (..., N, d).
        key: The keys, (..., M, d).
        value: The values, (..., M, d_v).
        output: The result, (..., N, d_v).
        extra: The first bias or mask that went into the logits, where it was asked for, by the convention of torch.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    extra: Tensor | None = None


@dataclass(frozen=True)
class Original:
    """How the old attention of a module is computed.

    Attributes:
        graph: The graph of its forward; None where the whole module is replaced.
        cores: Its cores, by the names of the new children.
        part: The nodes of the graph that its cores need.
    """

    graph: fx.Graph | None
    cores: dict[str, Core]
    part: frozenset[fx.Node] = frozenset()

    @classmethod
    def of(cls, module: nn.Module, reading: Reading | None, cores: dict[str, Core]) -> Original:
        """The original of a module of a weightless copy, whose forward was read."""
        if reading is None:
            return cls(None, {})
        outputs = [core.output for core in cores.values()]
        # Found now, while the values tell what writes into what; a run later has tensors of its own.
        part = needed_for(outputs, module, reading.values[False])
        return cls(reading.trace.graphs[False], cores, frozenset(part))

    def compute(
        self, module: nn.Module, arguments: dict[str, Any], with_extra: Iterable[str] = ()
    ) -> dict[str, Computed]:
        """Runs the old attention as far as its cores, without gradients.

        Args:
            module: The module, or a twin of it.
            arguments: The arguments of a call, by name.
            with_extra: The cores of which the first bias or mask is wanted.

        Returns:
            What each core gets and returns, by the name of the new child.
        """
        assert self.graph is not None
        extras = {name: self.cores[name].extras[0].node for name in with_extra if self.cores[name].extras}
        wanted = [node for c in self.cores.values() for node in (c.query, c.key, c.value, c.output)]
        # Outputs as the core returned them, before a forward may write into them.
        outputs = [core.output for core in self.cores.values()]
        runner = Partial(module, self.graph, arguments)
        values = run_part(runner, [*wanted, *extras.values()], self.part, outputs)
        found = {}
        for name, core in self.cores.items():
            # As scaled_dot_product_attention has them, however the old core laid them out.
            key = values[core.key].mT if core.key_transposed else values[core.key]
            value, output = (values[n].mT if core.transposed else values[n] for n in (core.value, core.output))
            extra = values[extras[name]] if name in extras else None
            if extra is not None and core.extras[0].how in ('dropped', 'subtracted'):
                extra = ~extra if core.extras[0].how == 'dropped' else -extra
            found[name] = Computed(values[core.query], key, value, output, extra)
        return found
