"""Plans SEM and External Attention for models that are not timm's, on the meta device, and tabulates what goes where.

    python benchmarks/foreign_models.py --out docs/foreign_models.md

Needs no weights and no network: configurations are tiny. The page is written where all libraries are installed; some
are tried by name, as in `foreign_models.py torchvision monai`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sem_timm

# What a library is imported as, and what its package is called where that is something else.
LIBRARIES = {
    'torch': 'torch',
    'torchvision': 'torchvision',
    'transformers': 'transformers',
    'open_clip': 'open_clip_torch',
    'segmentation_models_pytorch': 'segmentation-models-pytorch',
    'diffusers': 'diffusers',
    'ultralytics': 'ultralytics',
    'monai': 'monai',
}


@dataclass(frozen=True)
class Subject:
    """One model of a library.

    Attributes:
        library: What is imported.
        name: What the model is called in the table.
        make: Makes it from the library.
        input_size: Shape of one input, (C, H, W) or (C, D, H, W).
        part: Name of the part that is planned for, where the model as a whole cannot be.
    """

    library: str
    name: str
    make: Callable[[Any], nn.Module]
    input_size: tuple[int, ...]
    part: str = ''

    def create(self) -> nn.Module:
        """The model, in inference, or its part."""
        model = self.make(importlib.import_module(self.library)).eval()
        return model.get_submodule(self.part)

    @property
    def is_installed(self) -> bool:
        """Whether its library is there."""
        return find_spec(self.library) is not None


def _of_transformers(name: str, config: str, **sizes: Any) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library, name)(getattr(library, config)(**sizes))


_TRANSFORMER = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
_PATCHES = {**_TRANSFORMER, 'image_size': 32, 'patch_size': 8}
_STAGES = {'embed_dim': 16, 'depths': [2, 2], 'num_heads': [2, 4], 'window_size': 4, 'image_size': 32, 'patch_size': 2}
_SEGFORMER = {
    'hidden_sizes': [16, 16, 32, 32],
    'depths': [1, 1, 1, 1],
    'num_attention_heads': [1, 1, 2, 2],
    'decoder_hidden_size': 16,
}


def _encoder(library: Any) -> nn.Module:
    layer = library.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    patches = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), _Transposed())
    return nn.Sequential(patches, library.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class _Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def _swin(library: Any, block: str = 'SwinTransformerBlock', merging: str = 'PatchMerging') -> nn.Module:
    swin = library.models.swin_transformer
    return swin.SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], block=getattr(swin, block), downsample_layer=getattr(swin, merging)
    )


def _detector(library: Any) -> nn.Module:
    detection = library.models.detection
    return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)


def _clip(library: Any) -> nn.Module:
    text = {'context_length': 8, 'vocab_size': 64, 'width': 16, 'heads': 2, 'layers': 1}
    vision = {'image_size': 32, 'patch_size': 8, 'width': 32, 'head_width': 16, 'layers': 2}
    return library.model.CLIP(embed_dim=16, text_cfg=text, vision_cfg=vision)


def _segmentation(encoder: str) -> Callable[[Any], nn.Module]:
    return lambda library: library.Unet(encoder, encoder_weights=None)


def _autoencoder(library: Any) -> nn.Module:
    return library.AutoencoderKL(
        down_block_types=('DownEncoderBlock2D', 'DownEncoderBlock2D'),
        up_block_types=('UpDecoderBlock2D', 'UpDecoderBlock2D'),
        block_out_channels=(16, 32),
        norm_num_groups=8,
    )


def _yolo(name: str, model: str = 'DetectionModel') -> Callable[[Any], nn.Module]:
    return lambda library: getattr(importlib.import_module('ultralytics.nn.tasks'), model)(name, verbose=False)


def _monai(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(importlib.import_module('monai.networks.nets'), name)(**options)


_SMALL = (3, 32, 32)
_UNET = {'in_channels': 1, 'out_channels': 2, 'channels': (8, 16, 32), 'strides': (2, 2), 'num_res_units': 2}
SUBJECTS = (
    Subject('torch', 'nn.TransformerEncoder behind patches', _encoder, _SMALL),
    Subject('torchvision', 'resnet18', lambda tv: tv.models.resnet18(), (3, 64, 64)),
    Subject('torchvision', 'resnext50_32x4d', lambda tv: tv.models.resnext50_32x4d(), (3, 64, 64)),
    Subject('torchvision', 'mobilenet_v2', lambda tv: tv.models.mobilenet_v2(), (3, 64, 64)),
    Subject('torchvision', 'mobilenet_v3_small', lambda tv: tv.models.mobilenet_v3_small(), (3, 64, 64)),
    Subject('torchvision', 'efficientnet_b0', lambda tv: tv.models.efficientnet_b0(), (3, 64, 64)),
    Subject('torchvision', 'efficientnet_v2_s', lambda tv: tv.models.efficientnet_v2_s(), (3, 64, 64)),
    Subject('torchvision', 'regnet_y_400mf', lambda tv: tv.models.regnet_y_400mf(), (3, 64, 64)),
    Subject('torchvision', 'convnext_tiny', lambda tv: tv.models.convnext_tiny(), (3, 64, 64)),
    Subject('torchvision', 'shufflenet_v2_x0_5', lambda tv: tv.models.shufflenet_v2_x0_5(), (3, 64, 64)),
    Subject('torchvision', 'vgg11_bn', lambda tv: tv.models.vgg11_bn(), (3, 64, 64)),
    Subject('torchvision', 'DenseNet', lambda tv: tv.models.DenseNet(8, (2, 2), 16), (3, 64, 64)),
    Subject('torchvision', 'VisionTransformer', lambda tv: tv.models.VisionTransformer(32, 8, 2, 2, 32, 64), _SMALL),
    Subject('torchvision', 'SwinTransformer', _swin, _SMALL),
    Subject(
        'torchvision',
        'SwinTransformer, version 2',
        lambda tv: _swin(tv, 'SwinTransformerBlockV2', 'PatchMergingV2'),
        _SMALL,
    ),
    Subject(
        'torchvision',
        'MaxVit',
        lambda tv: tv.models.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.0),
        _SMALL,
    ),
    Subject(
        'torchvision',
        'deeplabv3_mobilenet_v3_large',
        lambda tv: tv.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None),
        (3, 64, 64),
    ),
    Subject('torchvision', 'r3d_18', lambda tv: tv.models.video.r3d_18(), (3, 4, 32, 32)),
    Subject('torchvision', 'retinanet_resnet50_fpn', _detector, (3, 64, 64)),
    Subject('torchvision', 'retinanet_resnet50_fpn, backbone', _detector, (3, 64, 64), 'backbone'),
    Subject('transformers', 'ViTModel', _of_transformers('ViTModel', 'ViTConfig', **_PATCHES), _SMALL),
    Subject(
        'transformers',
        "ViTModel, attention 'eager'",
        _of_transformers('ViTModel', 'ViTConfig', **_PATCHES, attn_implementation='eager'),
        _SMALL,
    ),
    Subject(
        'transformers',
        'ViTForImageClassification',
        _of_transformers('ViTForImageClassification', 'ViTConfig', **_PATCHES),
        _SMALL,
    ),
    Subject('transformers', 'DeiTModel', _of_transformers('DeiTModel', 'DeiTConfig', **_PATCHES), _SMALL),
    Subject('transformers', 'SwinModel', _of_transformers('SwinModel', 'SwinConfig', **_STAGES), _SMALL),
    Subject('transformers', 'Swinv2Model', _of_transformers('Swinv2Model', 'Swinv2Config', **_STAGES), _SMALL),
    Subject('transformers', 'Dinov2Model', _of_transformers('Dinov2Model', 'Dinov2Config', **_PATCHES), _SMALL),
    Subject('transformers', 'BeitModel', _of_transformers('BeitModel', 'BeitConfig', **_PATCHES), _SMALL),
    Subject(
        'transformers', 'CLIPVisionModel', _of_transformers('CLIPVisionModel', 'CLIPVisionConfig', **_PATCHES), _SMALL
    ),
    Subject(
        'transformers',
        'SiglipVisionModel',
        _of_transformers('SiglipVisionModel', 'SiglipVisionConfig', **_PATCHES),
        _SMALL,
    ),
    Subject(
        'transformers',
        'SegformerForSemanticSegmentation',
        _of_transformers('SegformerForSemanticSegmentation', 'SegformerConfig', **_SEGFORMER),
        (3, 64, 64),
    ),
    Subject(
        'transformers',
        'ConvNextModel',
        _of_transformers('ConvNextModel', 'ConvNextConfig', hidden_sizes=[16, 32], depths=[2, 2], num_stages=2),
        _SMALL,
    ),
    Subject(
        'transformers',
        'ConvNextV2Model',
        _of_transformers('ConvNextV2Model', 'ConvNextV2Config', hidden_sizes=[16, 32], depths=[2, 2], num_stages=2),
        _SMALL,
    ),
    Subject(
        'transformers',
        'ResNetModel',
        _of_transformers('ResNetModel', 'ResNetConfig', embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2]),
        (3, 64, 64),
    ),
    Subject('open_clip', 'CLIP, visual', _clip, _SMALL, 'visual'),
    Subject(
        'open_clip',
        'ModifiedResNet',
        lambda oc: oc.modified_resnet.ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=64, width=8),
        (3, 64, 64),
    ),
    *(
        Subject('segmentation_models_pytorch', f"Unet('{encoder}')", _segmentation(encoder), (3, 64, 64))
        for encoder in ('resnet18', 'efficientnet-b0', 'mobilenet_v2', 'densenet121', 'dpn68', 'vgg11_bn', 'mit_b0')
    ),
    Subject('diffusers', 'AutoencoderKL', _autoencoder, _SMALL),
    Subject('ultralytics', "DetectionModel('yolov8n.yaml')", _yolo('yolov8n.yaml'), (3, 64, 64)),
    Subject('ultralytics', "DetectionModel('yolo11n.yaml')", _yolo('yolo11n.yaml'), (3, 64, 64)),
    Subject(
        'ultralytics',
        "ClassificationModel('yolo11n-cls.yaml')",
        _yolo('yolo11n-cls.yaml', 'ClassificationModel'),
        (3, 64, 64),
    ),
    Subject(
        'monai',
        'UNet, 2 dimensions',
        _monai('UNet', spatial_dims=2, **_UNET),
        (1, 32, 32),
    ),
    Subject(
        'monai',
        'UNet, 3 dimensions',
        _monai('UNet', spatial_dims=3, **_UNET),
        (1, 16, 16, 16),
    ),
    Subject(
        'monai',
        'ViT',
        _monai(
            'ViT',
            in_channels=1,
            img_size=(32, 32),
            patch_size=(8, 8),
            hidden_size=32,
            mlp_dim=64,
            num_layers=2,
            num_heads=2,
            spatial_dims=2,
            classification=True,
            num_classes=2,
        ),
        (1, 32, 32),
    ),
    Subject('monai', 'SegResNet', _monai('SegResNet', spatial_dims=2, init_filters=8, in_channels=1), (1, 32, 32)),
    Subject(
        'monai',
        'SwinUNETR',
        _monai('SwinUNETR', in_channels=1, out_channels=2, feature_size=12, spatial_dims=2),
        (1, 64, 64),
    ),
)


OPERATIONS = {'SEM': 'sem', 'External Attention': 'external'}

HEAD = """# Models that are not timm's

Small configurations of models as their libraries make them, planned for as `plan_model(model, ..., input_size=...)`
without a target. A part of a model, such as a backbone, is planned for by itself, and patched where it is. What is
refused is left alone, with the reason; a model in which nothing takes an operation says so itself.
"""


@dataclass
class Outcome:
    """What one operation came to in one model.

    Attributes:
        sites: The number of sites.
        reasons: Why there are none, or how often modules were refused for what.
    """

    sites: int
    reasons: Counter[str]


def planned(model: nn.Module, operation: str, input_size: tuple[int, ...]) -> Outcome:
    """Plans an operation."""
    try:
        plan = sem_timm.plan_model(model, operation, input_size=input_size)
    except sem_timm.SemTimmError as error:
        return Outcome(0, _reasons(str(error)))
    return Outcome(len(plan), Counter(refusal.reason for refusal in plan.refusals))


def _reasons(message: str) -> Counter[str]:
    """Why nothing takes an operation: reasons of modules where there are some, else what the message says."""
    of_modules = Counter(re.findall(r'^  [\w.]+: (.*)$', message, re.MULTILINE))
    nothing = 'has no attention' if 'no attention modules' in message else 'has no blocks of its own; `target=` works'
    return of_modules or Counter([nothing if 'as far as can be seen' in message else message])


def _cell(outcome: Outcome) -> str:
    """An outcome as a cell of a table, without the places in files, which change."""
    reasons = []
    for reason, count in outcome.reasons.items():
        text = re.sub(r' \([\w./]+\.py:\d+[^|]*?\)(?=$|\n|: )', '', ' '.join(reason.split()))
        text = re.sub(r'(NotImplementedError: The register_meta function for torch.nonzero\(\))[^(]*', r'\1 …', text)
        reasons.append((f'{count} × ' if count > 1 else '') + text.replace('|', r'\|'))
    return f'{outcome.sites or "–"} | {"; ".join(reasons)}'


def report(rows: list[tuple[Subject, dict[str, Outcome]]]) -> str:
    """The page, a table for each library."""
    lines = [HEAD]
    for library, package in LIBRARIES.items():
        of_library = [(subject, outcomes) for subject, outcomes in rows if subject.library == library]
        lines += [f'## {package} {version(package)}', '', '| model | SEM | not | External Attention | not |']
        lines += ['|---|---:|---|---:|---|']
        for subject, outcomes in of_library:
            lines.append(f'| {subject.name} | {" | ".join(map(_cell, outcomes.values()))} |')
        lines.append('')
    made = f'`benchmarks/foreign_models.py` made this page on {datetime.date.today()}'
    return '\n'.join([*lines, f'{made}, with torch {torch.__version__} on a CPU.', ''])


def plan_all(names: Sequence[str]) -> Iterator[tuple[Subject, dict[str, Outcome]]]:
    """What became of each operation in the models of these names, or of libraries of these names."""
    for subject in SUBJECTS:
        if subject.is_installed and (not names or subject.library in names or subject.name in names):
            model = subject.create()
            yield subject, {o: planned(model, name, subject.input_size) for o, name in OPERATIONS.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='libraries, or models; all by default')
    parser.add_argument('--out', type=Path, help='where the Markdown goes')
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    rows = []
    for subject, outcomes in plan_all(args.names):
        rows.append((subject, outcomes))
        print(subject.library, subject.name, *map(_cell, outcomes.values()), sep='  ', flush=True)
    missing = [package for library, package in LIBRARIES.items() if find_spec(library) is None]
    if args.out and (missing or args.names):
        parser.error(f'the page is about all models; not installed: {", ".join(missing) or "none"}')
    if args.out:
        args.out.write_text(report(rows))


if __name__ == '__main__':
    main()
