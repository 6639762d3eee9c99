"""One attention layer: time and memory against the number of tokens, swapped and as timm has it.

    python benchmarks/attention.py                 # one thread of a CPU, eager, float32
    python benchmarks/attention.py --device cuda   # compiled, bfloat16, against flash attention, up to 65,536 tokens

A `timm.layers.Attention` of 384 channels and 6 heads at batch 1, in inference; the attentions take turns.
Ratios are medians over rounds, memory is counted by the allocator. `attention_plot.py` draws what is written here.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from common.measuring import Line, Times, options, peak_mib, prepared, record, take_turns
from sem_timm.layers import attention_names

CHANNELS, HEADS = 384, 6
ORIGINAL = 'original'

GRIDS = ('halo', 'monarch')  # attentions that need a grid

# All of them squares, for those.
TOKENS = {
    'cpu': (196, 576, 1024, 2304, 4096, 9216),
    'cuda': (196, 576, 1024, 2304, 4096, 9216, 16384, 36864, 65536),
}
GOALS = {196: 0.55, 1024: 0.25, 4096: 0.11, 9216: 0.05}
DOUBLING_GOAL = 2.1
EAMLP_GOAL = 0.90
MONARCH_GOALS = {1025: 0.45, 4097: 0.16, 9217: 0.10}
MONARCH_MEMORY_GOAL = 8.0
FLAT_GOAL = 1.10


class EquationsOfEAMLP(nn.Module):
    """The multi-head external attention of EAMLP as its equations are printed, one operation after the other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = 4 * num_heads
        width = dim // num_heads
        self.query = nn.Linear(dim, 4 * dim)
        self.memory_of_keys = nn.Linear(width, 64)
        self.memory_of_values = nn.Linear(64, width)
        self.projection = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.query(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        attention = self.memory_of_keys(heads).softmax(dim=-2)
        attention = attention / (1e-9 + attention.sum(dim=-1, keepdim=True))
        out = self.memory_of_values(attention)
        return self.projection(out.transpose(1, 2).reshape(batch, tokens, -1))


def attention_layer(name: str) -> nn.Module:
    """The attention module of a vision transformer of one block, swapped unless it is to be the original."""
    model = VisionTransformer(
        img_size=14, patch_size=1, embed_dim=CHANNELS, depth=1, num_heads=HEADS, class_token=False, global_pool='avg'
    ).eval()
    if name != ORIGINAL:
        sem_timm.patch_model(model, name)
    return model.get_submodule('blocks.0.attn')


class Bench:
    """The layers under test on one device.

    Args:
        attentions: Which attentions.
        device: 'cpu' or 'cuda'.
        compiled: Whether the layers go through `torch.compile`.
        runs: Rounds per figure.
    """

    def __init__(self, attentions: list[str], device: str, compiled: bool, runs: int) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device == 'cuda' else torch.float32
        self.compiled = compiled
        self.runs = runs
        self.layers = {name: attention_layer(name).to(device, self.dtype) for name in attentions}

    def call(self, layer: nn.Module, tokens: int, batch_size: int = 1) -> Callable[[], object]:
        """One forward of a layer, ready to be timed."""
        x = torch.randn(batch_size, tokens, CHANNELS, device=self.device, dtype=self.dtype)
        forward = torch.compile(layer, fullgraph=True, dynamic=False) if self.compiled else layer
        return lambda: forward(x)

    def start(self) -> None:
        """Forgets what was compiled: each size counts as a recompilation, of which a process has only a few."""
        if self.compiled:
            torch.compiler.reset()

    def goal(self, goal: float | None) -> float | None:
        """Goals for time are for eager layers on a CPU."""
        return goal if self.device == 'cpu' and not self.compiled else None

    def calls(self, tokens: int) -> dict[str, Callable[[], object]]:
        """A forward of each layer that so many tokens fit."""
        self.start()
        is_square = round(tokens**0.5) ** 2 == tokens
        return {name: self.call(layer, tokens) for name, layer in self.layers.items() if name not in GRIDS or is_square}

    def times(self, tokens: int) -> Times:
        """Seconds of all attentions at one number of tokens."""
        return take_turns(self.calls(tokens), self.runs, self.device)

    def memory(self, tokens: int) -> dict[str, float]:
        """Peak MiB of all attentions at one number of tokens."""
        return {name: peak_mib(call, self.device) for name, call in self.calls(tokens).items()}

    def monarch(self, tokens: int) -> Line:
        """The core alone against fused softmax attention, on a class token and a square of patches."""
        self.start()
        shape = 1, tokens, 3, HEADS, CHANNELS // HEADS
        packed = torch.randn(shape, device=self.device, dtype=self.dtype)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        core = sem_timm.MonarchAttention(shape[-1], num_prefix_tokens=1)
        forward = torch.compile(core, fullgraph=True, dynamic=False) if self.compiled else core
        calls = {'monarch': lambda: forward(q, k, v), 'sdpa': lambda: F.scaled_dot_product_attention(q, k, v)}
        times = take_turns(calls, self.runs, self.device)
        title = f'monarch core / scaled_dot_product_attention, {tokens:,} tokens'
        return times.line(title, 'monarch', 'sdpa', self.goal(MONARCH_GOALS.get(tokens)))

    def monarch_memory(self, low: int = 2304) -> Line:
        """What four times the tokens do to the peak memory of Monarch attention: times eight at most."""
        self.start()
        sides = {f'{n:,}': peak_mib(self.call(self.layers['monarch'], n), self.device) for n in (low, 4 * low)}
        small, large = sides.values()
        title = f'monarch, memory, {4 * low:,} / {low:,} tokens'
        return Line(title, large / small, MONARCH_MEMORY_GOAL, sides, 'MiB')

    def doubling(self, low: int = 4096) -> list[Line]:
        """What twice the tokens do to the peak memory of external attention."""
        self.start()
        call = self.call(self.layers['external'], low), self.call(self.layers['external'], 2 * low)
        sides = {f'{n:,}': peak_mib(c, self.device) for n, c in zip((low, 2 * low), call)}
        small, large = sides.values()
        return [Line(f'external, memory, {2 * low:,} / {low:,} tokens', large / small, DOUBLING_GOAL, sides, 'MiB')]

    def flatness(self, name: str, sizes: tuple[int, ...] = (1024, 2304, 4096, 9216)) -> Line:
        """The dearest token of any size over the cheapest."""
        self.start()
        times = take_turns({n: self.call(self.layers[name], n) for n in sizes}, self.runs, self.device)
        costs = {n: times.ratio(n, sizes[0]) * sizes[0] / n for n in sizes}
        sides = {f'{n:,}': times.median(n) / n * 1e6 for n in sizes}
        title = f'{name}, cost per token, {sizes[0]:,} to {sizes[-1]:,}'
        return Line(title, max(costs.values()) / min(costs.values()), self.goal(FLAT_GOAL), sides, 'µs')

    def eamlp(self, tokens: int, batch_size: int) -> Line:
        """The whole module of EAMLP against its equations."""
        self.start()
        layers = {
            'module': sem_timm.MultiHeadExternalAttention(CHANNELS, HEADS),
            'equations': EquationsOfEAMLP(CHANNELS, HEADS),
        }
        on_device = {name: layer.eval().to(self.device, self.dtype) for name, layer in layers.items()}
        calls = {name: self.call(layer, tokens, batch_size) for name, layer in on_device.items()}
        times = take_turns(calls, self.runs, self.device)
        title = f'eamlp / equations, {batch_size} x {tokens:,} tokens'
        return times.line(title, 'module', 'equations', self.goal(EAMLP_GOAL))


def curves(bench: Bench, tokens: tuple[int, ...]) -> tuple[dict[str, dict[str, list[float]]], list[Line]]:
    """Milliseconds and MiB of all attentions against the number of tokens, and the ratios of external attention."""
    milliseconds: dict[str, list[float]] = {name: [] for name in bench.layers}
    mib: dict[str, list[float]] = {name: [] for name in bench.layers}
    lines = []
    for count in track(tokens, description='tokens'):
        times, memory = bench.times(count), bench.memory(count)
        for name in bench.layers:
            milliseconds[name].append(round(times.median(name) * 1e3, 4))
            mib[name].append(round(memory[name], 3))
        for name in bench.layers:
            if name != ORIGINAL:
                goal = bench.goal(GOALS.get(count)) if name == 'external' else None
                lines.append(times.line(f'{name} / {ORIGINAL}, {count:,} tokens', name, ORIGINAL, goal))
    return {'milliseconds': milliseconds, 'peak_mib': mib}, lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument('--tokens', type=int, nargs='*', help='squares; by default what the device is good for')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, help='by default on a GPU only')
    args = prepared(parser, arguments)
    warnings.simplefilter('ignore', sem_timm.SwapWarning)
    # Of the kernels for plain softmax attention, the flash one is to be measured.
    torch.backends.cuda.enable_cudnn_sdp(False)
    compiled = args.device == 'cuda' if args.compile is None else args.compile
    tokens = tuple(args.tokens or ((16,) if args.quick else TOKENS[args.device]))
    bench = Bench([ORIGINAL, *attention_names()], args.device, compiled, args.runs)
    with torch.inference_mode():
        figures, lines = curves(bench, tokens)
        if not args.quick:
            lines += bench.doubling()
            lines += [bench.monarch(count) for count in MONARCH_GOALS]
            lines += [bench.monarch_memory()]
            lines += [bench.eamlp(196, 1), bench.eamlp(196, 8), bench.eamlp(1024, 1)]
            lines += [bench.flatness(name) for name in ('efficient', 'linear')]
    kept = [line for line in lines if line.goal or line.name.startswith('external')]
    setting = {'channels': CHANNELS, 'heads': HEADS, 'batch': 1, 'dtype': str(bench.dtype), 'compiled': compiled}
    record(args.out, args.device, 'layer', kept, setting=setting, tokens=tokens, **figures)


if __name__ == '__main__':
    main()
