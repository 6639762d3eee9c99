"""Arguments for plans and patches, as a user may give them: most have a meaning, many have none."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import Tensor, nn

import sem_timm


class Copy(nn.Module):
    """An identity that anybody could have written."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.init.ones_(nn.Conv1d(1, 1, 1).weight.new_empty(channels, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Narrow(nn.Module):
    """No module for this: it loses a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


# Those that leave the outputs as they are, those that do not, and those that mean nothing.
IDENTITIES: list[tuple[Any, dict[str, Any]]] = [
    ('sem', {}),
    ('sem', {'branches': 'all', 'operators': ('se', 'ie')}),
    ('sem', {'position': 'output'}),
    ('se', {'reduction': 4}),
    (sem_timm.SEMConfig(reduction=8), {}),
    ('external2d', {'memory': 4}),
    (Copy, {}),
]
OTHERS: list[tuple[Any, dict[str, Any]]] = [
    ('sem', {'init': 'paper'}),
    ('timm_cbam', {}),
    ('external', {'memory': 4}),
    ('external', {'memory': 4}),
    ('linear', {}),
    ('eamlp', {'memory': 4}),
    ('halo', {'block_size': 2, 'halo_size': 1}),
    ('monarch', {'passes': 2}),
]
ERRORS: list[tuple[Any, dict[str, Any]]] = [
    ('nonsense', {}),
    ('', {}),
    (3, {}),
    (None, {}),
    (nn.Conv2d, {}),
    (Narrow, {}),
    (nn.Identity(), {}),
    (sem_timm.SEMConfig(), {'reduction': 4}),
    (sem_timm.InsertConfig, {}),
    ('sem', {'reduction': 0}),
    ('sem', {'operators': ()}),
    ('sem', {'position': 'middle'}),
    ('sem', {'nonsense': 1}),
    ('external', {'memory': -1}),
    ('external', {'num_heads': 7}),
    ('timm_cbam', {'reduction': 'x'}),
]

SIZES = [*[None] * 24, (3,), (1, 64, 64), (3, -1, 64), 'x', (3, 8, 8), (0,)]


def operations() -> st.SearchStrategy[tuple[Any, dict[str, Any]]]:
    """An operation with its options."""
    return st.sampled_from([*IDENTITIES * 3, *OTHERS * 2, *ERRORS])


def targets(model: nn.Module) -> st.SearchStrategy[Any]:
    """A target or an exclude for a model."""
    names = [name for name, _ in model.named_modules() if name]
    classes = sorted({type(module) for module in model.modules()}, key=lambda cls: cls.__name__)
    return st.one_of(
        st.none(),
        st.none(),
        st.sampled_from(names),
        st.sampled_from(names).map(lambda name: f'{name.rpartition(".")[0]}.*'),
        st.lists(st.sampled_from([*names, *(name.rpartition('.')[2] for name in names)]), min_size=1, max_size=3),
        st.sampled_from(classes),
        st.sampled_from(names).map(lambda start: lambda name, module: name.startswith(start)),
        st.sampled_from(['(', 'nothing', '', '.*', [], [''], {}, 3, ['nothing'], (None,)]),
    )
