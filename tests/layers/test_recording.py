"""What `torch.jit.trace` and `torch.export` write down of a gate: common operations, with the numbers of eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sem_timm.layers import ChannelGate
from tests.layers.every_layer import CASES
from tests.versions import free_batch

GATES = [name for name, case in CASES.items() if isinstance(case.build(), ChannelGate)]
MAPS = [name for name in GATES if len(CASES[name].shapes[0]) == 3]

# What timm's own SE, ECA and GC are made of, and what any converter knows beside.
COMMON = {
    'add', 'mul', 'mean', 'relu', 'sigmoid', 'linear', '_convolution', 'conv1d', 'unsqueeze', 'squeeze', 'select',
    'slice', 'cat', 'group_norm', 'softmax', 'addmm', 't', 'size', 'Int', 'ones', 'new_ones', 'to',
}  # fmt: skip


def of_size(name: str, batch_size: int, side: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch_size, shape[0], side, side) for shape in CASES[name].shapes)


@pytest.mark.filterwarnings('ignore:.*torch.jit.trace.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*torch.jit.trace.*:FutureWarning')
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize('name', MAPS)
def test_traced_gates(name: str, mode: Any) -> None:
    gate = CASES[name].layer().eval()
    with mode():
        traced = torch.jit.trace(gate, of_size(name, 2, 6), check_trace=False)
    found = {node.kind().partition('::')[2] for node in traced.inlined_graph.nodes() if node.kind().startswith('aten')}
    assert found <= COMMON
    for batch_size, side in ((2, 6), (5, 6), (1, 9)):
        inputs = of_size(name, batch_size, side)
        for each in (torch.enable_grad, torch.no_grad):
            with each():
                torch.testing.assert_close(traced(*inputs), gate(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', MAPS)
def test_exported_gates(name: str) -> None:
    gate = CASES[name].layer().eval()
    batch = free_batch()
    inputs = of_size(name, 2, 6)
    dynamic_shapes = {'x': {0: batch}} if len(inputs) == 1 else None
    # Not strict is the newer default; a strict export of older versions looks as torch.compile does.
    program = torch.export.export(gate, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    operations = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert {name.split('.')[1] for name in operations if name.startswith('aten.')} <= COMMON | {'sym_size'}
    torch.testing.assert_close(program.module()(*inputs), gate(*inputs), rtol=1e-5, atol=1e-6)


def test_eager_mode_adds_the_shortcut_in_one_operation() -> None:
    """It takes a pass over memory less; and the check above could not fail if no gate had it."""
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    gate: nn.Module = CASES['sem_with_a_shortcut'].layer()
    with torch.no_grad(), Watch():
        gate(*CASES['sem_with_a_shortcut'].inputs())
    assert 'addcmul.default' in seen
