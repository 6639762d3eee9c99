"""The small models of timm's own tests under their names, for versions of timm that lack some of them.

Each is made of an older architecture of the same family by its options, without weights. Imported before `sem_timm`,
which registers variants of the architectures that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import timm
from timm.models import get_pretrained_cfg, model_entrypoint, register_model, resnet
from timm.models._registry import generate_default_cfgs
from torch import nn

_SMALL_VIT = dict(patch_size=16, embed_dim=96, depth=9, num_heads=3)
_REGISTER = dict(class_token=False, reg_tokens=1, no_embed_class=True, init_values=1e-5)
_SMALL_MAXXVIT = dict(img_size=160, embed_dim=(32, 64, 96, 128), stem_width=(16, 32))

# By name: the architecture it is made of, and what makes it small.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'test_resnet': (
        'resnet18',
        dict(
            layers=(1, 1, 1, 1),
            channels=(32, 48, 48, 96),
            stem_width=16,
            stem_type='deep',
            avg_down=True,
        ),
    ),
    'test_convnext': ('convnext_atto', dict(depths=(1, 2, 4, 2), dims=(24, 32, 48, 64), act_layer='gelu_tanh')),
    'test_mambaout': ('mambaout_femto', dict(depths=(1, 1, 3, 1), dims=(16, 32, 48, 64), expansion_ratio=3)),
    'test_nfnet': ('nfnet_l0', dict(depths=(1, 1, 1, 1), channels=(32, 64, 96, 128), group_size=8)),
    'test_vit3': ('vit_tiny_patch16_224', dict(**_SMALL_VIT, **_REGISTER, mlp_ratio=2, global_pool='map')),
    'test_vit4': ('vit_tiny_patch16_224', dict(**_SMALL_VIT, **_REGISTER, mlp_ratio=3, global_pool='avg')),
    'test_vit_relpos': ('vit_relpos_small_patch16_224', dict(**_SMALL_VIT, mlp_ratio=2, qkv_bias=False, fc_norm=True)),
    'test_maxvit': ('maxvit_pico_rw_256', dict(**_SMALL_MAXXVIT, depths=(1, 1, 1, 1))),
    'test_coatnet': ('coatnet_pico_rw_224', dict(**_SMALL_MAXXVIT, depths=(1, 1, 2, 1))),
}

# Where register_model looks for what there is besides the entry points.
__all__: list[str] = []
default_cfgs = generate_default_cfgs(
    {
        f'{name}.r160_in1k': dict(
            hf_hub_id='timm/',
            input_size=(3, 160, 160),
            num_classes=1000,
            fixed_input_size=name.startswith('test_vit'),
            first_conv='conv1.0' if name == 'test_resnet' else get_pretrained_cfg(architecture).first_conv,
            classifier=get_pretrained_cfg(architecture).classifier,
        )
        for name, (architecture, _) in _MODELS.items()
        if timm.is_model(architecture)
    }
)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    architecture, small = _MODELS[name]

    def entrypoint(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> nn.Module:
        if pretrained_cfg is None or isinstance(pretrained_cfg, str):
            pretrained_cfg = get_pretrained_cfg(name)
        build = model_entrypoint(architecture)
        with patch.object(resnet, 'make_blocks', _two_kinds) if name == 'test_resnet' else nullcontext():
            options = {**small, **options}
            model: nn.Module = build(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **options)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    return entrypoint


def _two_kinds(block: Any, channels: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """The stages of a ResNet, of which the third is of bottlenecks, which older versions of timm do not mix."""
    if block is not resnet.BasicBlock:
        return _make_blocks(block, channels, *args, **options)
    widths = (*channels[:2], channels[2] * resnet.Bottleneck.expansion, *channels[3:])
    stages, info = _make_blocks(block, widths, *args, **options)
    narrow = tuple(width // resnet.Bottleneck.expansion for width in widths)
    stages[2] = _make_blocks(resnet.Bottleneck, narrow, *args, **options)[0][2]
    return stages, info


_make_blocks = resnet.make_blocks


for _name in _MODELS:
    if not timm.is_model(_name) and timm.is_model(_MODELS[_name][0]):
        globals()[_name] = register_model(_entrypoint(_name))
