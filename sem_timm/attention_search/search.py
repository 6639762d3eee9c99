"""Which blocks keep softmax: from all blocks original, swap the one whose swap changes least, and so on.

Linear attention loses most in a few blocks, and not in those one would guess (JetViT and others find them by training
super-networks). Here nothing is trained: each block has its original attention and a new one, filled in closed form,
and forward passes tell which of them the model can do with.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sem_timm.attention_search.plan import FrontPoint, SearchedPlan
from sem_timm.attention_transfer.batches import first_batches
from sem_timm.attention_transfer.matching import narrow
from sem_timm.attention_transfer.memories import check_memories, initialize
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, make_pair
from sem_timm.attention_transfer.undisturbed import undisturbed
from sem_timm.attention_transfer.value_maps import fit_values
from sem_timm.batches import Loader
from sem_timm.errors import ModelError, OptionError, RefusedError, SwapWarning
from sem_timm.meta import shadow, weightless
from sem_timm.operations import AttentionConfig, patch_model, plan_model
from sem_timm.reports.costs import Cost, measured
from sem_timm.surgery import Plan, Target, check_model, tensors_in

# Called after each block that was tried, with the number of blocks swapped, the block, and the agreement.
Progress = Callable[[int, str, float], None]


def search(
    model: nn.Module,
    operation: Any,
    images: Loader,
    *,
    tolerance: float = 0.01,
    initialize: bool = True,
    max_batches: int | None = None,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
    amp_dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> SearchedPlan:
    """Finds the blocks of a trained model that can do with another attention, by forward passes alone.

    Greedy: the block whose swap keeps the agreement with the original highest is swapped, then the next, until none is
    left or the agreement would fall by more than the tolerance. With L blocks that are L (L + 1) / 2 passes over the
    images at most. The model stays as it is.

    Args:
        model: The trained model, not swapped.
        operation: As for `plan_model`: an attention such as 'external', with its options.
        images: Images that the model is for, as for `transfer`; not those that results are reported on. All of them are
            held in memory.
        tolerance: How much agreement may be lost, from 0 to below 1.
        initialize: Whether the new attentions are filled in closed form on the same images first, each on the
            original's inputs, where they have memories or maps; without it they are as drawn.
        max_batches: Look at so many batches of images at most.
        target: Which attention modules may be swapped, as for `plan_model`.
        exclude: Which not.
        input_size: Shape (C, H, W) of one image; by default that of the first.
        amp_dtype: Narrow type to compute in where that is precise enough, 'bfloat16' or 'float16', by autocast.
        seed: Of what is drawn.
        progress: Called after each block that was tried.
        **options: Options of the operation.

    Returns:
        The plan for the blocks found, which `patch_model` takes; printing it shows the front. What it patches is drawn
        anew: `transfer` with stages=('initialize',) fills it as it was filled here.

    Raises:
        SemTimmError: What `plan_model` raises; OptionError for a tolerance or images that do not fit; RefusedError if
            no single block keeps the agreement asked for; ModelError if outputs are no numbers.
    """
    _check_options(tolerance, initialize)
    how = TransferOptions(inputs='original', amp_dtype=amp_dtype, seed=seed)
    check_model(model)
    with undisturbed(seed):
        batches = [batch for batch, _ in first_batches(images, max_batches, model)]
        size = tuple(batches[0].shape[1:]) if input_size is None else input_size
        plan = plan_model(model, operation, target=target, exclude=exclude, input_size=size, **options)
        config = plan.operation
        if not isinstance(config, AttentionConfig):
            raise OptionError(f"{config} is no attention; search is for those, such as 'external'.")
        trial = _Trial(model, plan, config, batches, how, initialize)
        front = trial.front(tolerance, progress)
    chosen = plan_model(model, config, target=list(front[-1].swapped), input_size=size)
    found = {field.name: getattr(chosen, field.name) for field in fields(Plan)}
    return SearchedPlan(**found, front=front, tolerance=tolerance, num_images=sum(map(len, batches)))


def _check_options(tolerance: Any, initialize: Any) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise OptionError(f'tolerance={tolerance!r}: give the part of agreement that may be lost, from 0 to below 1.')
    if not isinstance(initialize, bool):
        raise OptionError(f'initialize={initialize!r}: write initialize=True or initialize=False.')


class _Trial:
    """The original, in which each attention module can be exchanged for its new one."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        config: AttentionConfig,
        batches: list[Tensor],
        how: TransferOptions,
        fill: bool,
    ) -> None:
        self.batches, self.how = batches, how
        self.names = list(dict.fromkeys(site.name for site in plan))
        swapped = shadow(model)
        swapped.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', SwapWarning)  # it is there to be tried
            patch_model(swapped, config, target=self.names, input_size=plan.input_size)
        self.pair = make_pair(swapped, batches[0], ('new',) if fill and plan.num_parameters else ())
        if fill and _can_be_filled(self.pair):
            initialize(self.pair, batches, how)
            fit_values(self.pair, batches, how)
        self.model = self.pair.teacher
        self.modules = {layer.name: (layer.teacher, layer.student) for layer in self.pair.layers}
        self.wanted = self._outputs()
        self.costs = _costs(model, swapped, plan)

    def front(self, tolerance: float, progress: Progress | None) -> tuple[FrontPoint, ...]:
        """The points from the original on, as far as the tolerance lets them."""
        points = [self._point((), 1.0, 0.0, self._timed_outputs()[1])]  # once more, now that all is warm
        left = list(self.names)
        while left:
            tried = {name: self._tried((*points[-1].swapped, name)) for name in left}
            for name, point in tried.items():
                if progress is not None:
                    progress(len(point.swapped), name, point.agreement)
            best = max(left, key=lambda name: (tried[name].agreement, -tried[name].distance))
            if tried[best].agreement < 1 - tolerance:
                break
            points.append(tried[best])
            left.remove(best)
        if len(points) == 1:
            raise RefusedError(
                f'no block can be swapped with {100 * tolerance:g} % of agreement to lose: the best, {best}, keeps '
                f'{100 * tried[best].agreement:.1f} %. Give tolerance={1 - tried[best].agreement:.3f} or more, or an '
                'attention that keeps more, such as with own=True, local=True.'
            )
        return tuple(points)

    def _tried(self, names: tuple[str, ...]) -> FrontPoint:
        self._put(names)
        given, seconds = self._timed_outputs()
        self._put(())
        agreement, distance = _agreement(given, self.wanted)
        return self._point(names, agreement, distance, seconds)

    def _point(self, names: tuple[str, ...], agreement: float, distance: float, seconds: float) -> FrontPoint:
        cost = sum((self.costs[name in names][name] for name in self.costs[0]), Cost())
        per_image = seconds / sum(map(len, self.batches))
        return FrontPoint(names, agreement, distance, cost.macs, cost.activation_bytes, per_image)

    def _put(self, names: tuple[str, ...]) -> None:
        """Puts new attention modules where they are named, and the original ones elsewhere."""
        for name, (old, new) in self.modules.items():
            parent, _, child = name.rpartition('.')
            self.model.get_submodule(parent)._modules[child] = new if name in names else old

    def _timed_outputs(self) -> tuple[Tensor, float]:
        """The outputs, and the seconds that they took."""
        start = time.perf_counter()
        return self._outputs(), time.perf_counter() - start

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        with narrow(self.how, self.batches[0]):
            outputs = torch.cat([tensors_in(self.model(images))[0].flatten(1).float() for images in self.batches])
        if not outputs.isfinite().all():
            raise ModelError(
                f'{type(self.model).__name__} returns numbers that are infinite or none at all, of which nothing can '
                'be said to agree. Look at the images and weights.'
            )
        return outputs


def _can_be_filled(pair: Pair) -> bool:
    try:
        check_memories(pair)
    except RefusedError:
        return False
    return True


def _agreement(given: Tensor, wanted: Tensor) -> tuple[float, float]:
    """How far outputs (B, K) agree, and one less their mean cosine."""
    cosine = float(F.cosine_similarity(given, wanted, dim=1).mean())
    alike = float((given.argmax(1) == wanted.argmax(1)).float().mean()) if wanted.shape[1] > 1 else cosine
    return alike, 1 - cosine


def _costs(model: nn.Module, swapped: nn.Module, plan: Plan) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """What each attention module costs, and under an empty name the rest, before and after all are swapped."""
    names = {site.name for site in plan}

    def part_of(module: str) -> str:
        return next((name for name in names if module == name or module.startswith(f'{name}.')), '')

    def costs(one: nn.Module) -> dict[str, Cost]:
        twin = weightless(one)
        for copy, parameter in zip(twin.parameters(), one.parameters()):
            copy.requires_grad_(parameter.requires_grad)
        return {'': Cost(), **measured(twin, plan.input_size, part_of)}

    return costs(model), costs(swapped)
