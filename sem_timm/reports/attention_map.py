"""Where the slots of an external memory look in an image."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from sem_timm.errors import ModelError, NoMatchError, OptionError, RefusedError, closest
from sem_timm.layers import ChannelsFirst, ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.meta import Layout, LayoutMode, dtype_of, probe, set_layout
from sem_timm.random_state import preserved_random_state
from sem_timm.reports.image_shape import explained_shape
from sem_timm.reports.isolation import device_of, isolated
from sem_timm.reports.pictures import check_path, overlays
from sem_timm.reports.token_grid import check_fits, check_not_windowed, check_order, token_grid, tokens_given

_MEMORIES = (ExternalAttention, MultiHeadExternalAttention, ExternalAttention2d)


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMap:
    """How much each image token reads from the slots of an external memory, for one image.

    Attributes:
        layer: Name of the layer in the model.
        maps: Shares (K, H, W) over the grid of tokens, between 0 and 1: how much of what a token reads comes from the
            slot. The slots of a head sum to 1 in every token.
        slots: The slot of each map.
        heads: The head of each map; None where there is one head, or a mean over heads that share their memory.
        image: The image as the model sees it, (H, W, 3), between 0 and 1.
    """

    layer: str
    maps: Tensor
    slots: tuple[int, ...]
    heads: tuple[int | None, ...]
    image: Tensor

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each map."""
        return tuple(
            f'slot {slot}' if head is None else f'head {head}, slot {slot}'
            for slot, head in zip(self.slots, self.heads)
        )

    def overlay(self, path: str | Path, *, most: int = 15) -> Path:
        """Draw the maps over the image, those first that differ most from place to place.

        Args:
            path: File to write, by its ending a PNG, SVG or PDF.
            most: Draw at most so many.

        Returns:
            The path.

        Raises:
            OptionError: If the ending is another one, the folder does not exist, or ``most`` is below 1.
            MissingPackageError: If matplotlib is not installed.
        """
        path = check_path(path)
        check_at_least_one('most', most)
        order = self.maps.flatten(1).std(1, correction=0).argsort(descending=True, stable=True)[:most].tolist()
        shown = f'{len(order)} of {len(self.maps)} maps' if len(order) < len(self.maps) else f'{len(order)} maps'
        height, width = self.maps.shape[1:]
        title = f'{self.layer}: where its memory slots look, {shown} on {height} × {width} tokens'
        overlays(
            path, self.image, [self.maps[index] for index in order], [self.labels[index] for index in order], title
        )
        return path

    def __repr__(self) -> str:
        count, height, width = self.maps.shape
        return f'AttentionMap(layer={self.layer!r}, {count} maps of {height} × {width} tokens)'


@dataclass
class _Seen:
    """What the layer's attention was, and what its attention module was given, in one pass."""

    attention: Tensor | None = None
    parts: int = 1
    given: list[Any] | None = None


def attention_map(
    model: nn.Module,
    image: Tensor | Image.Image,
    *,
    layer: int | str = -1,
    slots: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
) -> AttentionMap:
    """Shows where the memory slots of a layer with External Attention look in an image.

    The model runs once, in eval mode, on a copy around its own weights that has no hooks; it stays as it is.

    Args:
        model: A model with External Attention: 'external', 'eamlp' or 'external2d', patched in or built in.
        image: One image, as a normalised tensor (C, H, W) or (1, C, H, W), or as a PIL image, which is transformed as
            timm's data configuration of the model says.
        layer: Which layer, by its number in the order of ``named_modules`` or by its name.
        slots: Which slots; by default all.
        heads: Which heads. By default each one where heads have memories of their own, and the mean over all where
            they share one.

    Returns:
        The maps, a slot and a head each.

    Raises:
        ModelError: If the model has no External Attention, or it gives numbers that are not finite.
        NoMatchError: If there is no such layer.
        OptionError: If there is no such slot or head, or the image is none or of a shape that the model refuses, or a
            PIL image where the model takes neither one channel nor three.
        RefusedError: If the layer attends in windows, or its tokens form no grid or lie in another order.
    """
    with preserved_random_state():
        copy = isolated(model)
        name = _layer_name(copy, layer)
        check_order(copy, name)
        config = resolve_data_config({}, model=copy)
        images = _as_batch(image, copy, config).to(device_of(copy), dtype_of(copy))
        with explained_shape(copy, images):
            seen = _look(copy, name, images)
    if seen.attention is None:
        raise RefusedError(f'{name} is not run by the forward of this {type(model).__name__}.')
    if not seen.attention.isfinite().all():
        raise ModelError(f'{name} gives numbers that are not finite; weights or image are not.')
    size = (images.shape[2], images.shape[3])
    maps = _on_grid(name, copy.get_submodule(name), seen.attention, seen.parts, seen.given or [], size)
    return _chosen(name, maps, copy.get_submodule(name), slots, heads, _picture(images[0], config))


def _layer_name(model: nn.Module, layer: int | str) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, _MEMORIES)]
    if not names:
        raise ModelError(
            f'{type(model).__name__} has no External Attention, whose slots could look anywhere.\n'
            "  sem_timm.patch_model(model, 'external') puts it in place of self-attention."
        )
    if isinstance(layer, str):
        found = [name for name in names if layer in (name, name.rpartition('.')[0])]
        if len(found) != 1:
            raise NoMatchError(f'layer={layer!r} is no layer with External Attention. {closest(layer, names)}')
        return found[0]
    if isinstance(layer, bool) or not isinstance(layer, int) or not -len(names) <= layer < len(names):
        raise NoMatchError(f'layer={layer!r}: there are {len(names)} layers, {names[0]} to {names[-1]}.')
    return names[layer]


def _as_batch(image: Any, model: nn.Module, config: dict[str, Any]) -> Tensor:
    if isinstance(image, Image.Image):
        size = probe(model).input_size
        if size[0] not in (1, 3):
            raise OptionError(
                f'image is a PIL image, and {type(model).__name__} takes {size[0]} channels; '
                f'give a normalised tensor (C, H, W), such as of {size}.'
            )
        statistics = {key: config[key][: size[0]] for key in ('mean', 'std')}
        transform: Any = create_transform(**{**config, **statistics, 'input_size': size})
        return transform(image.convert('L' if size[0] == 1 else 'RGB')).unsqueeze(0)
    if not isinstance(image, Tensor):
        raise OptionError(f'image is a {type(image).__name__}; give a PIL image or a normalised tensor (C, H, W).')
    image = image if image.ndim == 4 else image.unsqueeze(0)
    if image.ndim != 4 or image.shape[0] != 1 or not image.is_floating_point():
        raise OptionError(
            f'image has the shape {tuple(image.shape)} and type {image.dtype}; give one normalised image (C, H, W).'
        )
    return image


def _look(model: nn.Module, name: str, images: Tensor) -> _Seen:
    """Runs a copy of a model on one image, and looks at one of its layers."""
    seen, module = _Seen(), model.get_submodule(name)

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.attention = module.attention(*args, **kwargs).float().cpu()
        if isinstance(module, ExternalAttention):
            seen.parts = args[0].shape[:-2].numel() // module.num_heads

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.given = [*args, *kwargs.values()]

    module.register_forward_pre_hook(look, with_kwargs=True)
    model.get_submodule(_told_by(model, name)).register_forward_pre_hook(listen, with_kwargs=True)
    with torch.no_grad(), LayoutMode():
        model(set_layout(images.clone(), Layout(channel=1)))
    return seen


def _told_by(model: nn.Module, name: str) -> str:
    """The module whose arguments tell about the tokens of a layer: the one around it, or the layer itself."""
    outer = name.rpartition('.')[0]
    around = isinstance(model.get_submodule(outer), ChannelsFirst)
    return outer if around or isinstance(model.get_submodule(name), ExternalAttention) else name


def _on_grid(
    name: str, module: nn.Module, attention: Tensor, parts: int, given: list[Any], image_size: tuple[int, int]
) -> Tensor:
    """The attention as maps (heads, slots, H, W)."""
    if isinstance(module, ExternalAttention2d):
        samples, _, height, width = attention.shape
        check_not_windowed(name, samples, 1, height * width, height * width)
        if not (given and isinstance(given[0], Tensor) and given[0].ndim == 3):
            check_fits(name, (height, width), image_size)
            return attention  # (1, slots, H, W)
        # Tokens, which were laid out as a square or as one column, whatever they are in the image, without the prefix.
        attention, given = attention.flatten(2).mT, []
    elif isinstance(module, MultiHeadExternalAttention):
        check_not_windowed(name, attention.shape[0], 1, attention.shape[1], attention.shape[1])
        attention = attention[0].transpose(0, 1)  # (heads, N, slots)
    else:
        assert isinstance(module, ExternalAttention)
        samples, total = tokens_given(given)
        check_not_windowed(name, samples, parts, attention.shape[-2], total)
        if module.num_heads > 1:
            attention = attention.movedim(module.head_axis, 0)
        attention = attention.reshape(-1, *attention.shape[-2:])
    grid = token_grid(attention.shape[1], given, image_size)
    if grid is None:
        size = ' × '.join(map(str, image_size))
        raise RefusedError(f'the {attention.shape[1]} tokens of {name} form no grid over {size} pixels.')
    check_fits(name, (grid.height, grid.width), image_size)
    return attention[:, grid.prefix :].mT.unflatten(2, (grid.height, grid.width))


def _chosen(
    name: str,
    maps: Tensor,
    module: nn.Module,
    slots: int | Sequence[int] | None,
    heads: int | Sequence[int] | None,
    picture: Tensor,
) -> AttentionMap:
    own = isinstance(module, ExternalAttention) and module.num_heads > 1
    which_slots = _indices('slots', slots, maps.shape[1], name)
    if heads is None and not own:
        maps, labels = maps.mean(0, keepdim=True), [None]
    else:
        which_heads = _indices('heads', heads, maps.shape[0], name)
        maps, labels = maps[which_heads], which_heads  # type: ignore[assignment]
    maps = maps[:, which_slots].flatten(0, 1)
    return AttentionMap(
        name,
        maps,
        tuple(slot for _ in labels for slot in which_slots),
        tuple(head for head in labels for _ in which_slots),
        picture,
    )


def _indices(what: str, given: int | Sequence[int] | None, count: int, name: str) -> list[int]:
    if given is None:
        return list(range(count))
    is_one = not isinstance(given, Iterable) or getattr(given, 'ndim', None) == 0
    entries: list[Any] = [given] if is_one else list(given)  # type: ignore[arg-type]
    try:
        indices = [operator.index(entry) for entry in entries]  # numpy's integers too
    except TypeError:
        indices = []
    wrong = any(isinstance(entry, bool) for entry in entries) or not all(-count <= i < count for i in indices)
    if wrong or not indices:
        raise OptionError(f'{what}={given!r}: {name} has {count}, numbered from 0.')
    return [index % count for index in indices]


def _picture(image: Tensor, config: dict[str, Any]) -> Tensor:
    """A normalised image (C, H, W) as it was before, (H, W, 3)."""
    image = image.detach().float().cpu()
    mean, std = (torch.tensor(config[key]) for key in ('mean', 'std'))
    if len(mean) != len(image):
        image, mean, std = image[:1], mean[:1], std[:1]
    picture = image * std[:, None, None] + mean[:, None, None]
    low, high = picture.min(), picture.max()
    if low < -0.1 or high > 1.1:  # it was normalised in another way
        picture = (picture - low) / (high - low).clamp(min=1e-6)
    return picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
