"""timm variants: every architecture of timm also as ``{arch}_sem``, and with another attention where it has one.

They are registered through timm's public `register_model`. A variant is its base, built by the base's own entry point
with weights and all, and then patched. Those that give the outputs of their base, or nearly, claim its weights. timm's
scripts and listings see it as any other model; its options have the prefix ``sem_``, ``ea_``, ``eamlp_``,
``timm_cbam_`` and so on.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    is_model,
    model_entrypoint,
    register_model,
    register_notrace_module,
    split_model_name_tag,
)
from torch import nn

from sem_timm.compat import get_arch_pretrained_cfgs
from sem_timm.layers import SEM, AttentionCore, ChannelsFirst, ExternalAttention2d, MultiHeadExternalAttention
from sem_timm.registry.table import AttentionTable, read_table
from sem_timm.registry.variant_operation import VariantOperation, variant_operation_names

__all__ = ['base_architecture', 'base_arguments', 'register_variants']

default_cfgs: dict[str, DefaultCfg] = {}  # where register_model looks for the pretrained cfgs of an entry point

DEFAULT_OPERATIONS = ('sem', 'external', 'eamlp', 'monarch')

# Layers that look at their inputs before they go on, which feature_cls='fx' cannot follow; with their subclasses.
_LEAVES = (SEM, AttentionCore, ChannelsFirst, ExternalAttention2d, MultiHeadExternalAttention)


def register_variants(*operations: str) -> None:
    """Registers variants of the architectures that timm knows at this moment; those that exist already are left.

    ``{arch}_sem`` and those of timm's own attentions, such as ``{arch}_timm_cbam``, are there for every architecture;
    ``{arch}_ea`` and the other attentions, such as ``{arch}_efficient``, for those with self-attention that can be
    replaced; ``{arch}_monarch`` for those whose attention it is close to, and with the pretrained weights of the base.
    For an architecture newer than the table of those, whether it can shows when a model is created.

    Args:
        *operations: 'sem', 'external' (``{arch}_ea``), another attention that replaces self-attention, such as
            'efficient', or one of timm's that is inserted, such as 'timm_cbam'. By default those that importing the
            package registers: 'sem', 'external', 'eamlp' and 'monarch'.

    Raises:
        OptionError: If no variants can be made with an operation.
    """
    made_with = [VariantOperation(name) for name in operations or DEFAULT_OPERATIONS]
    table = read_table()
    for layer in _LEAVES:
        register_notrace_module(layer)
    names = list(__all__)
    for architecture in timm.list_models():
        if model_entrypoint(architecture).__module__ != __name__:
            __all__.clear()  # register_model looks through all of it for every name that it adds
            known = architecture in table.sites
            _register(architecture, [each for each in made_with if _serves(each, architecture, table)], known)
            names += __all__
    __all__[:] = names


def base_architecture(name: str) -> str:
    """The architecture that a variant is made of; of one that is no variant, its own name."""
    if not is_model(name) or model_entrypoint(name).__module__ != __name__:
        return name
    suffixes = (VariantOperation(operation).suffix for operation in variant_operation_names())
    return next(base for s in suffixes if name.endswith(s) and is_model(base := name.removesuffix(s)))


def base_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that a variant is created with, those of its base; of what is no variant, all."""
    base = base_architecture(name)
    prefix = f'{name.removeprefix(base)[1:]}_'
    return {key: value for key, value in arguments.items() if base == name or not key.startswith(prefix)}


def _serves(operation: VariantOperation, architecture: str, table: AttentionTable) -> bool:
    return not is_model(architecture + operation.suffix) and (
        not operation.replaces_attention or table.count(architecture, operation) != 0
    )


def _register(architecture: str, operations: list[VariantOperation], known: bool) -> None:
    cfgs = _pretrained_cfgs(architecture) if operations else {}
    # Of an architecture that the table does not know, nobody looked whether another attention is close to its own.
    claiming = {o for o in operations if not o.changes_outputs or (o.keeps_skill and known)}
    weightless = {tag: _without_weights(cfg) for tag, cfg in cfgs.items() if len(claiming) < len(operations)}
    for operation in operations:
        name = architecture + operation.suffix
        if cfgs:
            default_cfgs[name] = _default_cfg(cfgs if operation in claiming else weightless)
        globals()[name] = register_model(_entrypoint(architecture, operation, name))


def _pretrained_cfgs(architecture: str) -> dict[str, PretrainedCfg]:
    """The pretrained cfgs of an architecture by tag, the default first."""
    # From where the architecture's own registration took them: asked for by name, timm copies each of them in depth,
    # which would be most of the time that importing this package takes. They are not changed here.
    given = getattr(sys.modules[model_entrypoint(architecture).__module__], 'default_cfgs', {}).get(architecture)
    if not isinstance(given, DefaultCfg):
        return {split_model_name_tag(name)[1]: cfg for name, cfg in get_arch_pretrained_cfgs(architecture).items()}
    return {tag: _with_repository(given.cfgs[tag], architecture, tag) for tag in given.tags}


def _with_repository(cfg: PretrainedCfg, architecture: str, tag: str) -> PretrainedCfg:
    """The cfg with its repository on the hub in full, which registration would complete by the name of a variant."""
    if cfg.hf_hub_id != 'timm/':
        return cfg
    cfg = copy.copy(cfg)
    cfg.hf_hub_id = f'timm/{architecture}.{tag}' if tag else f'timm/{architecture}'
    return cfg


def _default_cfg(by_tag: dict[str, PretrainedCfg]) -> DefaultCfg:
    """The pretrained cfgs of an architecture as timm takes them, the default first."""
    return DefaultCfg(deque(by_tag), by_tag, is_pretrained=any(cfg.has_weights for cfg in by_tag.values()))


def _without_weights(cfg: PretrainedCfg) -> PretrainedCfg:
    """What a cfg says of images and classes, for a variant that has no weights of its own and must not be listed so."""
    cfg = copy.copy(cfg)
    cfg.url = cfg.file = cfg.hf_hub_id = cfg.hf_hub_filename = cfg.state_dict = None
    return cfg


def _entrypoint(architecture: str, operation: VariantOperation, name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from sem_timm.registry.variant import create_variant  # with the surgery, which a listing does not need

        return create_variant(architecture, operation, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    return entrypoint
