"""One variant: its base, built by the base's own entry point with weights and all, and then patched."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

from timm.models import (
    PretrainedCfg,
    get_pretrained_cfg,
    model_entrypoint,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from torch import nn

from sem_timm.errors import SwapWarning
from sem_timm.layers import ChannelGate
from sem_timm.operations import patch_model, plan_model
from sem_timm.registry.features import build_features
from sem_timm.registry.options import Options, has_tensors, pop_options
from sem_timm.registry.variant_operation import VariantOperation
from sem_timm.registry.weights import load_inserted, own_weights, restore_source, split, without_variant
from sem_timm.surgery import patched_modules

_SOURCES = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'custom_load')


def create_variant(
    architecture: str,
    operation: VariantOperation,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a base with its weights, patches it, and loads the weights of the new modules where there are any.

    Raises:
        OptionError: If an option is unknown or out of range, or a saved model has not the weights of the variant that
            it says it is.
    """
    name = architecture + operation.suffix
    options = pop_options(operation, name, kwargs)
    # Drawn as published for want of weights, so that those of the base may come yet and make identities of them.
    expects_base = not operation.changes_outputs and not pretrained and 'init' not in options
    if not operation.changes_outputs:
        options.setdefault('init', 'identity' if pretrained else 'paper')
    overlay = dict(pretrained_cfg_overlay or {}, architecture=name)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay) if pretrained else PretrainedCfg()
    inserted, rest = split(own_weights(cfg, kwargs.get('cache_dir')), operation)
    # A saved model says what it is, and only modules without tensors leave no trace in its weights.
    is_saved = pretrained and 'pretrained_model_args' in kwargs
    untrained = not inserted and (not is_saved or has_tensors(operation, options))
    if is_saved and untrained and kwargs.get('pretrained_strict', True):
        raise without_variant(cfg, architecture, name)
    if inserted:
        # The base loads its part itself, since only its family knows how to fit it to other classes or image sizes.
        overlay.update(state_dict=rest, source=None)
    elif pretrained and operation.changes_outputs and isinstance(pretrained_cfg, (dict, PretrainedCfg)):
        overlay.update(_sources(architecture, cfg))

    changes: list[str] = []

    def patch(model: nn.Module) -> nn.Module:
        changes.append(_patch(model, operation, {**_image_shape(kwargs), **options}))
        if expects_base:
            for gate in (module for module in model.modules() if isinstance(module, ChannelGate)):
                gate.expect_base()
        if inserted:
            load_inserted(model, inserted, name, operation, strict=kwargs.get('pretrained_strict', True))
            restore_source(model, cfg)
        return model

    base = model_entrypoint(architecture)
    given = dict(pretrained=pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    build = partial(base, **given, **kwargs)
    model: Any = build_features(build, patch) if kwargs.get('features_only') else patch(build())
    # What create_model and save_for_hf keep as the arguments that rebuild the model; init must not be guessed again.
    of_operation = {operation.prefix + key: value for key, value in options.items()}
    model._model_args = {**getattr(model, '_model_args', {}), **of_operation}
    if operation.changes_outputs and pretrained and untrained:
        _warn(f'{name} has the weights of {architecture} but for its new attention ({operation.name}), {changes[0]}')
    return model


def _image_shape(arguments: dict[str, Any]) -> Options:
    """The shape of the images that a base is built for, where it is told: not every family keeps it in the model."""
    size = arguments.get('img_size')
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    return {'input_size': (arguments.get('in_chans', 3), *sides)} if sides else {}


def _sources(architecture: str, cfg: PretrainedCfg) -> dict[str, Any]:
    """Where the weights of a base are, for a cfg of its variant, which does not claim to have any."""
    if cfg.has_weights or cfg.state_dict:
        return {}
    of_base = get_pretrained_cfg(f'{architecture}.{cfg.tag}' if cfg.tag else architecture) or PretrainedCfg()
    return {source: getattr(of_base, source) for source in _SOURCES}


def _patch(model: nn.Module, operation: VariantOperation, options: Options) -> str:
    """Patches a base; returns what that means for pretrained weights, in words."""
    plan = plan_model(model, operation.name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)  # said once the model is there, if it has weights to lose
        patch_model(model, plan)
    needs = 'so it gives other outputs and needs training'
    if not operation.replaces_attention:
        return needs
    for part in patched_modules(model):
        # These modules look at their arguments before they go on, which feature_cls='fx' cannot follow.
        register_notrace_module(type(model.get_submodule(part.name)))
    config: Any = plan.operation
    return needs if plan.needs_training else f'which is close to its own, without training. {config.fidelity}'


def _warn(what: str) -> None:
    """Emits a SwapWarning at the line outside of timm and this package from where a model is created."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get('__name__', '').partition('.')[0] in ('timm', 'sem_timm'):
        level, frame = level + 1, frame.f_back
    warnings.warn(f'{what}; unpatch_model(model) gives the base back.', SwapWarning, stacklevel=level)
