"""A gate behind a norm or a layer scale keeps nothing of the size of its input, and has the gradients it always had."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sem_timm.layers import SEM, ChannelGate, Excitation, gate, recomputed
from sem_timm.layers.kept import sums_of
from tests.layers.kept_bytes import kept_bytes
from tests.thorough import first_of_each
from tests.versions import tells_saved_tensors_hooks

pytestmark = tells_saved_tensors_hooks

CHANNELS = 6


def norm(norm_class: Callable[..., Any] = nn.BatchNorm2d, *, training: bool = True, **options: Any) -> nn.Module:
    """A batch norm in double precision with statistics and weights of its own."""
    module = norm_class(CHANNELS, dtype=torch.double, **options)
    for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return module.train(training)


def with_weight(value: float) -> nn.Module:
    module = norm()
    nn.init.constant_(module.weight, value)  # type: ignore[arg-type]
    return module


class Frozen(nn.Module):
    """A norm that does not learn, in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm(training=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.eval()(x)


class LayerScale(nn.Module):
    """A product with one number for each channel, in either order, or with one number for all."""

    def __init__(self, *shape: int, first: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape, dtype=torch.double) + 0.5)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x if self.first else x * self.gamma


class DropPath(nn.Module):
    """Drops the branches of some samples and makes up for it in the others, always the same ones."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([0.0, 2.0, 2.0], dtype=x.dtype).view(-1, *(1 for _ in x.shape[1:]))


class Permuted(nn.Module):
    """Changes the order of axes, and takes all of the first one."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)[...]


class Expanded(nn.Module):
    """A gate that is as large as its input, as ECA's is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid().expand_as(x)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


MAPS, TOKENS, ROW = (3, CHANNELS, 4, 5), (3, 7, CHANNELS), (3, CHANNELS, 7)
ENDINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'norm in training': (norm, MAPS),
    'norm in inference': (lambda: norm(training=False), MAPS),
    'frozen norm': (Frozen, MAPS),
    'norm without weights': (lambda: norm(affine=False), MAPS),
    'norm without statistics': (lambda: norm(track_running_stats=False, training=False), MAPS),
    'norm with a cumulative average': (lambda: norm(momentum=None), MAPS),
    'norm with weights of zero': (lambda: with_weight(0.0), MAPS),
    'norm with negative weights': (lambda: with_weight(-0.7), MAPS),
    'norm, one image': (norm, (1, *MAPS[1:])),
    'norm, one dimension': (lambda: norm(nn.BatchNorm1d), ROW),
    'norm, three dimensions': (lambda: norm(nn.BatchNorm3d), (*MAPS, 2)),
    'drop path': (lambda: nn.Sequential(norm(), DropPath()), MAPS),
    'drop path behind a frozen norm': (lambda: nn.Sequential(Frozen(), DropPath(), Half()), MAPS),
    'layer scale': (lambda: LayerScale(CHANNELS, 1, 1), MAPS),
    'layer scale, tokens': (lambda: LayerScale(CHANNELS), TOKENS),
    'layer scale, channels last': (lambda: LayerScale(CHANNELS, first=True), (3, 4, 5, CHANNELS)),
    'layer scale, then another order of axes': (
        lambda: nn.Sequential(Permuted(0, 2, 3, 1), LayerScale(CHANNELS), Permuted(0, -1, 1, 2)),
        MAPS,
    ),
    'norm, then another order of axes twice': (
        lambda: nn.Sequential(Permuted(0, -1, 1, 2), norm(), Half(), Permuted(0, 3, 2, 1), Permuted(0, 2, 1, 3)),
        (3, 4, 5, CHANNELS),
    ),
    'product with a gate of another kind': (
        lambda: nn.Sequential(norm(), LayerScale(CHANNELS, 1, 1), Expanded()),
        MAPS,
    ),
    'one number for all': (lambda: LayerScale(1), MAPS),
    'SiLU': (nn.SiLU, MAPS),
    'SiLU in place': (lambda: nn.SiLU(inplace=True), MAPS),
    'GELU': (nn.GELU, TOKENS),
    'GELU by tanh': (lambda: nn.GELU('tanh'), TOKENS),
    'hard swish, drop path': (lambda: nn.Sequential(nn.Hardswish(), DropPath()), MAPS),
    'layer norm': (lambda: nn.LayerNorm(CHANNELS, dtype=torch.double), TOKENS),
    'layer norm without weights': (lambda: nn.LayerNorm(CHANNELS, elementwise_affine=False), TOKENS),
    'layer norm, then another order of axes': (
        lambda: nn.Sequential(Permuted(0, 2, 3, 1), nn.LayerNorm(CHANNELS, dtype=torch.double), Permuted(0, 3, 1, 2)),
        MAPS,
    ),
    'layer scale and drop path': (lambda: nn.Sequential(LayerScale(CHANNELS, 1, 1), DropPath()), MAPS),
}
# Those that take a matrix product or a convolution: only where there is a shortcut, whose sum tells them.
DEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'linear': (lambda: nn.Linear(CHANNELS, CHANNELS, dtype=torch.double), TOKENS),
    'linear without bias': (lambda: nn.Linear(CHANNELS, CHANNELS, bias=False, dtype=torch.double), TOKENS),
    'linear and drop path': (
        lambda: nn.Sequential(nn.Linear(CHANNELS, CHANNELS, dtype=torch.double), DropPath(), Half()),
        (3, 4, 5, CHANNELS),
    ),
    'linear, then another order of axes': (
        lambda: nn.Sequential(
            Permuted(0, 2, 3, 1), nn.Linear(CHANNELS, CHANNELS, dtype=torch.double), Permuted(0, 3, 1, 2)
        ),
        MAPS,
    ),
    'convolution': (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.double), MAPS),
    'convolution without bias': (
        lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2, bias=False, dtype=torch.double),
        MAPS,
    ),
    'convolution, transposed': (lambda: nn.ConvTranspose1d(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.double), ROW),
}
GATES: dict[str, Callable[..., ChannelGate]] = {
    'sem': SEM,
    'sem, softmax': lambda *args, **options: SEM(*args, decision='softmax', **options),
    'sem, equal': lambda *args, **options: SEM(*args, decision='equal', **options),
    **{
        name: lambda *args, name=name, **options: Excitation(*args, excitation=name, **options)
        for name in ('se', 'eca', 'ie', 'lct', 'ese', 'ceca')
    },
}


class Block(nn.Module):
    """What ends a branch, a gate, and the sum with the shortcut."""

    def __init__(self, ending: str = 'norm in training', gate_name: str = 'sem', prefix: int = 0) -> None:
        super().__init__()
        make, self.shape = {**ENDINGS, **DEAR}[ending]
        self.ending = make()
        channel_dim = 1 if self.shape[1] == CHANNELS else -1
        options: dict[str, Any] = {'channel_dim': channel_dim, 'num_prefix_tokens': prefix, 'dtype': torch.double}
        self.gate = GATES[gate_name](CHANNELS, **options)
        for parameter in self.gate.parameters():
            nn.init.normal_(parameter)

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x, shortcut = (torch.randn(self.shape, dtype=torch.double, generator=generator) for _ in range(2))
        return x.requires_grad_(), shortcut.requires_grad_()

    def forward(self, x: Tensor, shortcut: Tensor | None = None, **options: Any) -> Tensor:
        return self.gate(self.ending(x * 1.0), shortcut, **options)


def is_fast(z: Tensor) -> bool:
    """Whether a gated sum was computed without keeping its input."""
    return z.grad_fn is not None and z.grad_fn.name() == '_GatedBackward'


_NUMERICAL = ['norm in training', 'convolution', 'frozen norm', 'layer scale', 'drop path', 'SiLU']


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    block: Block,
    *args: Any,
    written_over: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> tuple[list[Any], list[Any]]:
    """Output and all gradients, and the same where every input is kept; the output may be written over before."""
    found = []
    for keep in (False, True):
        with monkeypatch.context() as patch:
            if keep:
                patch.setattr(gate, 'follows', lambda *args: None)
            z = block(*args, **options)
        assert is_fast(z) is not keep
        z = z if written_over is None else written_over(z)
        loss = (z * torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z).sin()).sum()
        leaves = [arg for arg in (*args, *block.parameters()) if isinstance(arg, Tensor) and arg.requires_grad]
        found.append([z, *torch.autograd.grad(loss, leaves)])
    return found[0], found[1]


def assert_equal_gradients(fast: list[Tensor], plain: list[Tensor], part: float = 1e-12) -> None:
    assert torch.equal(fast[0], plain[0])
    assert fast[0].stride() == plain[0].stride()
    for one, other in zip(fast[1:], plain[1:], strict=True):
        assert (one - other).norm() <= part * (1 + other.norm())


@pytest.mark.parametrize('ending', ENDINGS)
def test_gradients_are_those_of_the_plain_way(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    block = Block(ending)
    x, shortcut = block.inputs()
    assert_equal_gradients(*both_ways(monkeypatch, block, x))
    assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut))
    assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut.detach()))


@pytest.mark.parametrize('ending', DEAR)
def test_what_is_dear_to_compute_again_is_a_difference(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    block = Block(ending)
    x, shortcut = block.inputs()
    calls: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(recomputed, '_computed', lambda *args: calls.append(args))
        assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut))
        assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut, shortcut_first=True))
        assert not calls
    # Where the sum is written over, it tells nothing any more.
    assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut, written_over=torch.sigmoid_))


def test_without_a_shortcut_or_a_bias_that_learns_what_is_dear_is_kept() -> None:
    block = Block('linear')
    x, shortcut = block.inputs()
    assert is_fast(block(x, shortcut))
    assert not is_fast(block(x))
    block.ending.bias.requires_grad_(False)  # type: ignore[union-attr]
    assert not is_fast(block(x, shortcut))
    assert not is_fast(block.float()(x.float(), shortcut.float()).bfloat16())


def test_a_gate_of_zero_has_no_gradient() -> None:
    block = Block('linear', 'se')
    nn.init.constant_(block.gate.operators['se'].fc2.bias, -1e6)  # type: ignore[union-attr,arg-type]
    x, shortcut = block.inputs()
    z = block(x, shortcut)
    assert is_fast(z) and torch.equal(z, shortcut)
    gradients = torch.autograd.grad(z.square().sum(), [x, *block.parameters()])
    assert all(each.isfinite().all() for each in gradients)


def test_no_images_have_no_gradient() -> None:
    for ending in ('norm in inference', 'layer scale', 'linear'):
        block = Block(ending)
        x = torch.empty(0, *block.shape[1:], dtype=torch.double, requires_grad=True)
        block(x, x * 2).sum().backward()
        assert all(not p.grad.any() for p in block.parameters() if p.grad is not None)


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('ending', ['norm in training', 'layer scale', 'linear', 'layer norm', 'convolution'])
def test_autocast(monkeypatch: pytest.MonkeyPatch, ending: str, inside: bool) -> None:
    """Gradients are as far from the exact ones as they are where every input is kept, or closer; over some draws."""

    def gradients(block: Block, mix: nn.Module, keep: bool, half: bool) -> list[Tensor]:
        x, shortcut = (each.detach().float().requires_grad_() for each in block.inputs())
        with monkeypatch.context() as patch:
            if keep:
                patch.setattr(gate, 'follows', lambda *args: None)
            with torch.autocast('cpu', torch.bfloat16, enabled=half):
                z = block.gate(block.ending(mix(x)), mix(shortcut))
                if inside:
                    return list(torch.autograd.grad(z.float().square().sum(), [x, *block.parameters()]))
            return list(torch.autograd.grad(z.float().square().sum(), [x, *block.parameters()]))

    errors = [0.0, 0.0]
    for seed in range(8):
        torch.manual_seed(seed)
        block = Block(ending).float()
        mix = nn.Conv2d(CHANNELS, CHANNELS, 1) if block.shape == MAPS else nn.Linear(CHANNELS, CHANNELS)
        exact = gradients(block, mix, True, False)
        scale = sum(float(true.norm()) for true in exact)
        for number, keep in enumerate((False, True)):
            found = gradients(block, mix, keep, True)
            errors[number] += sum(float((one.float() - true).norm()) for one, true in zip(found, exact)) / scale
    assert errors[0] <= 1.2 * errors[1] + 1e-6


@pytest.mark.parametrize('name', GATES)
def test_every_gate_comes_along(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    block = Block(gate_name=name)
    assert_equal_gradients(*both_ways(monkeypatch, block, *block.inputs()))


def test_prefix_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block('layer scale, tokens', prefix=2)
    assert_equal_gradients(*both_ways(monkeypatch, block, *block.inputs()))


@pytest.mark.parametrize('first', [False, True])
def test_result_lies_in_memory_as_it_always_did(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    block = Block()
    for layouts in ((True, True), (True, False), (False, True)):
        inputs = [
            each.detach().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            for each, last in zip(block.inputs(), layouts)
        ]
        x, shortcut = (each.requires_grad_() for each in inputs)
        assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut, shortcut_first=first))


def test_constant_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    x, shortcut = (torch.full_like(each, 3.0).requires_grad_() for each in block.inputs())
    assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut), part=1e-9)


@pytest.mark.parametrize('ending', first_of_each(_NUMERICAL))
def test_gradients_are_the_numerical_ones_and_so_are_their_gradients(ending: str) -> None:
    block = Block(ending)
    x, shortcut = (each[:, :, :2, :2].detach().requires_grad_() for each in block.inputs())
    assert is_fast(block(x, shortcut))
    assert torch.autograd.gradcheck(block, (x, shortcut))
    assert torch.autograd.gradgradcheck(block, (x, shortcut))


def test_several_gates_behind_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    outer = Block('norm in inference')
    block.gate, block.second = nn.Sequential(block.gate, outer.ending), outer.gate  # type: ignore[assignment]

    def forward(x: Tensor, shortcut: Tensor) -> Tensor:
        return block.second(block.gate(block.ending(x)), shortcut)  # type: ignore[operator]

    block.forward = forward  # type: ignore[method-assign]
    assert_equal_gradients(*both_ways(monkeypatch, block, *block.inputs()))


def test_what_reads_the_norm_besides_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()

    def forward(x: Tensor, shortcut: Tensor) -> Tensor:
        y = block.ending(x)
        seen.append(y)
        return block.gate(y, shortcut + y.square())

    seen: list[Tensor] = []
    block.forward = forward  # type: ignore[method-assign]
    assert_equal_gradients(*both_ways(monkeypatch, block, *block.inputs()))


def test_activations_behind_may_work_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    x, shortcut = block.inputs()
    assert_equal_gradients(*both_ways(monkeypatch, block, x, shortcut, written_over=torch.relu_))


def test_hooks_of_the_norm_and_of_its_output_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    calls: list[str] = []
    block.ending.register_forward_hook(lambda *args: calls.append('called'))
    block.ending.register_forward_hook(lambda module, args, y: y.register_hook(lambda g: g * 3) and None)
    assert_equal_gradients(*both_ways(monkeypatch, block, *block.inputs()))
    assert calls == ['called'] * 2

    block.ending.register_forward_hook(lambda module, args, y: y.sin())
    assert not is_fast(block(*block.inputs()))


def test_the_plain_way_where_there_is_nothing_to_follow_from() -> None:
    block = Block()
    x, shortcut = block.inputs()
    assert is_fast(block(x, shortcut))
    assert not is_fast(block.gate(x.sin(), shortcut))
    assert not is_fast(block.gate(nn.functional.avg_pool2d(x, 3, 1, 1), shortcut))
    assert not is_fast(block.gate(block.ending(x) * torch.rand(x.shape[2:]), shortcut))
    assert not is_fast(block.gate(block.ending(x), shortcut.float()))
    with torch.no_grad():
        assert block(x, shortcut).grad_fn is None


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')  # torch's own forward mode
def test_transforms_and_forward_mode_see_plain_steps() -> None:
    block = Block('layer scale')
    x, shortcut = block.inputs()
    expected = torch.autograd.grad(block(x, shortcut).sum(), x)[0]
    found = torch.func.grad(lambda x: block(x, shortcut.detach()).sum())(x.detach())
    assert torch.allclose(found, expected, rtol=1e-10)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert forward_ad.unpack_dual(block(dual, shortcut)).tangent is not None
    rows = torch.autograd.functional.jacobian(lambda x: block(x, shortcut).sum((1, 2, 3)), x.detach(), vectorize=True)
    assert torch.allclose(rows.sum(0), expected, rtol=1e-10)


def _count(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize('fast', [True, False])
def test_under_hooks_for_saved_tensors(fast: bool) -> None:
    block = Block()
    x, shortcut = block.inputs()
    expected = torch.autograd.grad(block(x, shortcut).square().sum(), [x, *block.parameters()])
    once: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        once[len(once)] = tensor
        return len(once) - 1

    with saved_tensors_hooks(_count, _count) if fast else saved_tensors_hooks(pack, lambda key: once.pop(key)):
        z = block(x, shortcut)
    assert is_fast(z) is fast
    found = torch.autograd.grad(z.square().sum(), [x, *block.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(found, expected))


@pytest.mark.parametrize('reentrant', [True, False])
def test_under_checkpointing_and_offloading(reentrant: bool) -> None:
    block = Block()
    x, shortcut = block.inputs()
    expected = torch.autograd.grad(block(x, shortcut).square().sum(), [x])

    def backward(z: Tensor) -> Tensor:
        x.grad = None
        z.square().sum().backward()
        assert x.grad is not None
        return x.grad

    checkpointed = backward(checkpoint(block, x, shortcut, use_reentrant=reentrant))
    assert torch.allclose(checkpointed, expected[0], rtol=1e-10)
    with save_on_cpu():
        z = block(x, shortcut)
    assert torch.allclose(backward(z), expected[0], rtol=1e-10)


def test_backward_again_and_its_error() -> None:
    block = Block()
    x, shortcut = block.inputs()
    loss = block(x, shortcut).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize('ending', ['norm in training', 'linear'])
def test_a_backward_frees_what_was_kept(ending: str) -> None:
    block = Block(ending)
    x, shortcut = block.inputs()
    held: list[Any] = []
    block.ending.register_forward_pre_hook(lambda module, args: held.append(weakref.ref(args[0])))
    z = block(x, shortcut * 1.0)
    held.append(weakref.ref(z.untyped_storage()))
    loss = z.sum()
    del z
    assert held[0]() is not None
    loss.backward()
    assert [each() for each in held] == [None, None]


def test_gradients_in_float32_are_as_exact_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv, double = nn.Conv2d(16, 64, 3, padding=1), SEM(64, dtype=torch.double)
    end = nn.BatchNorm2d(64)
    for parameter in double.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(4, 16, 24, 24) + 3.0
    weights = torch.randn(4, 64, 24, 24, dtype=torch.double)

    def gradients(dtype: torch.dtype, keep: bool) -> list[Tensor]:
        with monkeypatch.context() as patch:
            if keep:
                patch.setattr(gate, 'follows', lambda *args: None)
            modules = [module.to(dtype) for module in (conv, end, double)]
            z = modules[2](modules[1](modules[0](x.to(dtype))))
        assert is_fast(z) is not keep
        return list(torch.autograd.grad((z * weights.to(dtype)).sum(), list(double.parameters())))

    exact = gradients(torch.double, True)
    for dtype, part in ((torch.float32, 1e-5), (torch.bfloat16, 0.5)):
        error = [
            max(float((one.double() - true).norm() / true.norm()) for one, true in zip(gradients(dtype, keep), exact))
            for keep in (False, True)
        ]
        assert error[0] <= max(1.5 * error[1], part / 100)
        assert error[0] <= part


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [3, 150])  # samples that are summed up some at a time, and one at a time
@pytest.mark.parametrize('form', ['contiguous', 'channels_last', 'NHWC', 'tokens', 'strided'])
def test_sums_of_products(form: str, size: int, dtype: torch.dtype) -> None:
    """Of every layout, of small and large samples: as exact as sums in double precision that are rounded once."""
    shape, positions = {'NHWC': ((5, size, size, 4), (1, 2)), 'tokens': ((5, size * size, 4), (1,))}.get(
        form, ((5, 4, size, size), (2, 3))
    )
    one, two = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    if form == 'channels_last':
        one, two = (each.contiguous(memory_format=torch.channels_last) for each in (one, two))
    elif form == 'strided':
        one, two = (torch.stack([each, each], -1)[..., 0] for each in (one, two))
    with torch.no_grad():
        products, sums = sums_of(one, two, positions)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(products, (one.double() * two.double()).sum(positions).to(exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums, two.double().sum(positions).to(exact), rtol=1e-5, atol=0)


def test_nothing_of_the_size_of_the_input_is_kept() -> None:
    """SEM behind a norm keeps its means and logits."""
    torch.manual_seed(0)
    block = Block()
    shape = (2, CHANNELS, 64, 64)
    x, shortcut = (torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(2))
    plain = kept_bytes(lambda: block.ending(x * 1.0) + shortcut, block)
    gated = kept_bytes(lambda: block(x, shortcut), block)
    assert plain == pytest.approx(x.nbytes, rel=0.01)
    assert gated <= 1.005 * plain


def test_a_forward_without_backward_frees_what_was_kept() -> None:
    for ending in ('norm in training', 'linear'):
        block = Block(ending)
        x, shortcut = block.inputs()
        held: list[Any] = []
        block.ending.register_forward_pre_hook(lambda module, args, held=held: held.append(weakref.ref(args[0])))
        z = block(x, shortcut)
        assert is_fast(z) and held[0]() is not None
        del z
        assert held[0]() is None


class Largest(SEM):
    def pool(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


def _both(monkeypatch: pytest.MonkeyPatch, forward: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    results = []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr(gate, 'follows', lambda *args: None)
        z = forward()
        loss = (z * torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z).sin()).sum()
        results.append([z.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-12 * (1 + other.norm())


def test_another_pooling_has_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    block.gate = Largest(CHANNELS, init='paper', dtype=torch.double)
    x, shortcut = block.inputs()
    _both(monkeypatch, lambda: block(x, shortcut), [x, *block.parameters()])


FORMS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    'broadcast norm': lambda m, x, w: m(x[:1]) * w[:, :1, :1, :1].detach(),
    'broadcast positions': lambda m, x, w: m(x[:, :, :1, :1]) * torch.ones(1, dtype=x.dtype).expand(1, 1, *x.shape[2:]),
    'broadcast activation': lambda m, x, w: (
        nn.functional.silu(x[:1].flatten(2)).view(1, *x.shape[1:]) * w[:, :1, :1, :1].detach()
    ),
    'activation of tokens, viewed as a map': lambda m, x, w: (
        nn.functional.silu(x.reshape(6, 10, CHANNELS)).view(3, 20, CHANNELS).permute(0, 2, 1).view(x.shape)
    ),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('with_shortcut', [False, True])
def test_shapes_on_the_way(monkeypatch: pytest.MonkeyPatch, form: str, with_shortcut: bool) -> None:
    block = Block()
    x, shortcut = block.inputs()
    extra = [shortcut] if with_shortcut else []
    _both(monkeypatch, lambda: block.gate(FORMS[form](block.ending, x, shortcut), *extra), [x, *block.parameters()])


PRODUCTS: dict[str, Callable[[nn.Linear, Tensor, Tensor], Tensor]] = {
    'viewed as a map': lambda m, x, w: (
        m(x.reshape(6, 10, CHANNELS)).view(3, 20, CHANNELS).permute(0, 2, 1).view(x.shape)
    ),
    'broadcast': lambda m, x, w: m(x[:1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * w[:, :1, :1, :1].detach(),
    'scaled': lambda m, x, w: torch.addmm(m.bias, x.reshape(-1, CHANNELS), m.weight, beta=0.5, alpha=2.0).view(x.shape),
}


@pytest.mark.parametrize('form', PRODUCTS)
def test_products_whose_sum_was_written_over(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    block, linear = Block(), nn.Linear(CHANNELS, CHANNELS, dtype=torch.double)
    x, shortcut = block.inputs()
    leaves = [x, shortcut, *linear.parameters(), *block.gate.parameters()]
    _both(monkeypatch, lambda: torch.relu_(block.gate(PRODUCTS[form](linear, x, shortcut), shortcut)), leaves)


def test_parameters_written_over_before_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    block, bias = Block('layer scale'), torch.zeros(CHANNELS, 1, 1, dtype=torch.double, requires_grad=True)
    x, shortcut = block.inputs()
    start = block.ending.gamma.detach().clone()  # type: ignore[operator,union-attr]

    def forward() -> Tensor:
        with torch.no_grad():
            block.ending.gamma.copy_(start)  # type: ignore[operator,union-attr]
        z = block(x, shortcut)
        with torch.no_grad():
            block.ending.gamma.add_(1.0)  # type: ignore[operator,union-attr]
        return z

    z = block.gate(nn.functional.silu(x) + bias, shortcut)
    assert is_fast(z)
    with torch.no_grad():
        bias.add_(1.0)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        z.sum().backward()
    _both(monkeypatch, forward, list(block.gate.parameters()))


@pytest.mark.parametrize('ending', ['norm in training', 'layer scale', 'SiLU', 'drop path'])
def test_what_comes_before_may_be_checkpointed_alone(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    block = Block(ending)
    x, shortcut = block.inputs()

    def forward() -> Tensor:
        return block.gate(checkpoint(block.ending, x * 1.0, use_reentrant=False), shortcut)

    _both(monkeypatch, forward, [x, shortcut, *block.parameters()])


def test_hooks_that_are_over_forbidden_hooks_and_what_was_freed() -> None:
    block = Block()
    x, shortcut = block.inputs()
    once: list[Tensor | None] = []

    def pack(tensor: Tensor) -> int:
        once.append(tensor)
        return len(once) - 1

    def unpack(key: int) -> Tensor:
        tensor, once[key] = once[key], None
        assert tensor is not None
        return tensor

    with saved_tensors_hooks(pack, unpack):
        y = block.ending(x)
    block.gate(y, shortcut).sum().backward()
    with torch.autograd.graph.disable_saved_tensors_hooks('none here'):
        block(x, shortcut).sum().backward()
    y = block.ending(x)
    y.sum().backward()
    assert torch.autograd.grad(block.gate(y, shortcut).sum(), list(block.gate.parameters()))
