"""timm variants: every architecture of timm also as ``{arch}_sem``, through timm's public `register_model`.

A variant is its base, built by the base's own entry point with weights and all, and then patched. timm's scripts and
listings see it as any other model; its options have the prefix ``sem_``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    is_model,
    load_state_dict,
    load_state_dict_from_hf,
    model_entrypoint,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from timm.models._hub import HF_WEIGHTS_NAME, load_state_dict_from_path
from torch import Tensor, nn

from sem_timm.errors import OptionError
from sem_timm.layers import SEM
from sem_timm.operations import SEMConfig, patch_model

__all__ = ['register_variants']

default_cfgs: dict[str, DefaultCfg] = {}  # where register_model looks for the pretrained cfgs of an entry point

Weights = dict[str, Tensor]

_SUFFIX = '_sem'
_PREFIX = 'sem_'
_INSERTED = re.compile(r'(^|\.)sem\d*_*\.')  # the keys of inserted modules: sem, or sem1, sem2 in one block
_FEATURE_ARGUMENTS = ('features_only', 'out_indices', 'feature_location')


def register_variants() -> None:
    """Register ``{arch}_sem`` for every architecture that timm knows at this moment and that has no variant yet."""
    register_notrace_module(SEM)  # a leaf for feature_cls='fx', which traces through everything else
    for architecture in timm.list_models():
        name = architecture + _SUFFIX
        if architecture.endswith(_SUFFIX) or is_model(name):
            continue
        cfgs = get_arch_pretrained_cfgs(architecture)
        if cfgs:
            default_cfgs[name] = _mirror(cfgs)
        globals()[name] = register_model(_entrypoint(architecture, name))


def _mirror(cfgs: dict[str, PretrainedCfg]) -> DefaultCfg:
    """The pretrained cfgs of a base for its variant, the default first; weights stay those of the base's repository."""
    by_tag = {split_model_name_tag(name)[1]: cfg for name, cfg in cfgs.items()}
    return DefaultCfg(deque(by_tag), by_tag, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _entrypoint(architecture: str, name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_variant(architecture, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    return entrypoint


def _create_variant(
    architecture: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a base with its weights, patch it, and load the weights of the inserted modules where there are any."""
    name = architecture + _SUFFIX
    options = _pop_options(name, kwargs)
    options.setdefault('init', 'identity' if pretrained else 'paper')
    overlay = dict(pretrained_cfg_overlay or {}, architecture=name)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay) if pretrained else PretrainedCfg()
    inserted, rest = _split(_own_weights(cfg, kwargs.get('cache_dir')))
    if inserted:
        # The base loads its part itself, since only its family knows how to fit it to other classes or image sizes.
        overlay.update(state_dict=rest, source=None)

    def patch(model: nn.Module) -> nn.Module:
        patch_model(model, 'sem', **options)
        if inserted:
            _load_inserted(model, inserted, name, strict=kwargs.get('pretrained_strict', True))
            _restore_source(model, cfg)
        return model

    build = partial(
        model_entrypoint(architecture),
        pretrained=pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )
    model: Any = _build_features(build, patch) if kwargs.get('features_only') else patch(build())
    # What create_model and save_for_hf keep as the arguments that rebuild the model; init must not be guessed again.
    model._model_args = {**getattr(model, '_model_args', {}), **{_PREFIX + key: v for key, v in options.items()}}
    return model


def _pop_options(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the operation out of the arguments of an entry point; None is timm's word for the default."""
    known = [_PREFIX + option for option in ('target', 'exclude', 'input_size', *(f.name for f in fields(SEMConfig)))]
    options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(_PREFIX)}
    for key in options:
        if key not in known:
            raise OptionError(f'{name} has no option {key!r}. There are: {", ".join(known)}.')
    return {key.removeprefix(_PREFIX): value for key, value in options.items() if value is not None}


def _own_weights(cfg: PretrainedCfg, cache_dir: Any) -> Weights:
    """The weights that a caller's file, folder, hub model or state_dict holds; nothing for those timm registered.

    They may be those of the base or those of a variant, which only their keys tell.
    """
    weights: Weights = {}
    if cfg.custom_load:  # a foreign format, which only the base's family reads
        return weights
    if cfg.source == 'local-dir' and cfg.file:
        weights = load_state_dict_from_path(cfg.file)
    elif cfg.source == 'hf-hub' and cfg.hf_hub_id:
        filename = cfg.hf_hub_filename or HF_WEIGHTS_NAME
        weights = load_state_dict_from_hf(cfg.hf_hub_id, filename, cache_dir=cache_dir)
    elif cfg.state_dict:
        weights = cfg.state_dict
    elif cfg.file:
        weights = load_state_dict(cfg.file)
    return weights


def _is_inserted(key: str) -> bool:
    return _INSERTED.search(key) is not None


def _split(weights: Weights) -> tuple[Weights, Weights]:
    """The entries of a state_dict that belong to inserted modules, and the others."""
    inserted = {key: weights[key] for key in weights if _is_inserted(key)}
    return inserted, {key: weights[key] for key in weights if key not in inserted}


def _load_inserted(model: nn.Module, inserted: Weights, name: str, *, strict: bool) -> None:
    """Load the weights of the inserted modules; with ``strict`` all of them and no others."""
    expected = {key for key in model.state_dict() if _is_inserted(key)}
    missing, unexpected = sorted(expected - inserted.keys()), sorted(inserted.keys() - expected)
    if strict and (missing or unexpected):
        raise OptionError(
            f'The weights given for {name} were trained with other options: '
            f'{len(missing)} of its tensors are not among them{_example(missing)}, '
            f'{len(unexpected)} of theirs have no place in it{_example(unexpected)}.\n'
            f'  Give the options of the training, such as sem_target=..., sem_operators=..., to create_model.'
        )
    model.load_state_dict(inserted, strict=False)


def _example(keys: Iterable[str]) -> str:
    first = next(iter(keys), None)
    return f' ({first})' if first else ''


def _restore_source(model: Any, cfg: PretrainedCfg) -> None:
    """Let the record of the weights tell where they came from, and not hold them."""
    for record in (model.pretrained_cfg, model.default_cfg):
        record.pop('state_dict', None)
        if cfg.source:
            record['source'] = cfg.source


def _build_features(build: partial[nn.Module], patch: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A feature backbone; its blocks are patched while they are still in the whole model, where they can be planned."""
    wrapper = build.keywords.get('feature_cls')
    if wrapper is None or isinstance(wrapper, str):
        wrapper = type(_on_meta(build))
        if not wrapper.__module__.startswith('timm.models._features'):
            return _patch_own_features(build, patch)
    return build(feature_cls=_patching(wrapper, patch))


def _on_meta(build: partial[nn.Module]) -> nn.Module:
    """What ``build`` builds, but without weights, memory or random numbers."""
    device = {'device': 'meta'} if 'device' in build.keywords else {}
    with torch.device('meta'):
        return build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **device)


def _patch_own_features(build: partial[nn.Module], patch: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A family's own feature class: it keeps the names of the whole model, but may not say which are its blocks."""
    features: Any = build()
    if hasattr(features, 'group_matcher'):
        return patch(features)
    arguments = {key: value for key, value in build.keywords.items() if key not in _FEATURE_ARGUMENTS}
    whole: Any = _on_meta(partial(build.func, **arguments))
    features.group_matcher = lambda coarse=False: whole.group_matcher(coarse=coarse)
    try:
        return patch(features)
    finally:
        del features.group_matcher


def _patching(wrapper: Any, patch: Callable[[nn.Module], nn.Module]) -> Any:
    """What timm takes for the feature wrapper: patches the whole model it gets, then builds the wrapper itself."""

    def wrap(model: nn.Module, **feature_cfg: Any) -> nn.Module:
        return wrapper(patch(model), **feature_cfg)

    if not isinstance(wrapper, type):
        return wrap
    # A subclass, because timm decides by issubclass which arguments a wrapper gets.
    return type(wrapper.__name__, (wrapper,), {'__new__': lambda cls, model, **cfg: wrap(model, **cfg)})
