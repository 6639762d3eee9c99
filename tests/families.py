"""The families the promises are tested on: they differ in layout, residual form and how their blocks are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import mvitv2
from torch import Tensor, nn

from tests.lively import lively


def create(architecture: str, **options: Any) -> nn.Module:
    """A model in inference, with the same random weights each time, norms and layer scales included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = lively(timm.create_model(architecture, **options))
    return model.eval()


@dataclass(frozen=True)
class Family:
    """A small member of a family, its inputs, and what it shows."""

    architecture: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    other_size: int | None = 96

    def create(self, **options: Any) -> nn.Module:
        """The model with random weights that do not depend on what ran before, norms and layer scales included."""
        return create(self.architecture, **{'num_classes': 10, **self.options, **options})

    def images(self, batch_size: int = 2, size: int | None = None) -> Tensor:
        size = size or self.size
        return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))

    @property
    def input_size(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


# A Swin of two stages, for models of which only a block of each kind matters.
SMALL_SWIN: dict[str, Any] = {
    'img_size': 64,
    'window_size': 4,
    'embed_dim': 24,
    'depths': (2, 2),
    'num_heads': (3, 6),
    'strict_img_size': False,
}

# A configuration that timm's entry point takes as `cfg_variant`; its own are too large for hundreds of tests.
mvitv2.model_cfgs['small mvitv2'] = mvitv2.MultiScaleVitCfg(
    depths=(1, 1, 1, 1), embed_dim=(32, 48, 64, 96), num_heads=(1, 2, 2, 4)
)
SMALL_MVITV2: dict[str, Any] = {'img_size': 64, 'cfg_variant': 'small mvitv2'}

_SWIN = {'img_size': 64, 'window_size': 4, 'embed_dim': 24, 'depths': (2, 2, 2, 2), 'strict_img_size': False}

FAMILIES = {
    'resnet': Family('test_resnet'),
    'resnetv2': Family('resnetv2_18'),
    'regnet': Family('regnety_002'),
    'efficientnet': Family('test_efficientnet'),
    'convnext': Family('test_convnext'),
    'vgg': Family('vgg11_bn', size=32, other_size=64, options={'mlp_ratio': 0.02}),
    'densenet': Family('densenet121', size=32, other_size=64, options={'block_config': (2, 3, 3, 2)}),
    'vit_registers': Family('test_vit', options={'reg_tokens': 4, 'img_size': 64, 'dynamic_img_size': True}),
    'deit_distilled': Family('deit_tiny_distilled_patch16_224', options={'img_size': 64}, other_size=None),
    'swin': Family('swin_tiny_patch4_window7_224', options=_SWIN),
    'maxvit': Family('test_maxvit', other_size=None, options={'img_size': 64}),
    'coatnet': Family('test_coatnet', other_size=None, options={'img_size': 64}),
    'mixer': Family('mixer_s32_224', options={'img_size': 64}, other_size=None),
    'nfnet': Family('test_nfnet'),
    'hrnet': Family('hrnet_w18_small'),
    'mobilenetv4': Family('mobilenetv4_conv_small_035'),
    'dla': Family('dla46_c'),
    'levit': Family('levit_128s', size=224, other_size=None),
    'mvitv2': Family('mvitv2_tiny', other_size=None, options=SMALL_MVITV2),
    'pvt_v2': Family('pvt_v2_b0'),
    'volo': Family('volo_d1_224', options={'img_size': 64}, other_size=None),
    'xcit': Family('xcit_nano_12_p16_224'),
    'rexnet': Family('rexnet_100'),
    'coat': Family(
        'coat_tiny', other_size=None, options={'img_size': 64, 'serial_depths': (1, 2, 1, 1), 'parallel_depth': 2}
    ),
    'tiny_vit': Family('tiny_vit_5m_224', other_size=None),
}
