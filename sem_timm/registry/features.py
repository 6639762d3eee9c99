"""Feature backbones of variants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sem_timm.compat import on_meta, wrapper_arguments

Patch = Callable[[nn.Module], nn.Module]

_FEATURE_ARGUMENTS = ('features_only', 'out_indices', 'feature_location')


def build_features(build: partial[nn.Module], patch: Patch) -> nn.Module:
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
    return on_meta(partial(build, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **device))


def _patch_own_features(build: partial[nn.Module], patch: Patch) -> nn.Module:
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


def _patching(wrapper: Any, patch: Patch) -> Any:
    """What timm takes for the feature wrapper: patches the whole model it gets, then builds the wrapper itself."""

    def wrap(model: nn.Module, **feature_cfg: Any) -> nn.Module:
        return wrapper(patch(model), **wrapper_arguments(wrapper, feature_cfg))

    if not isinstance(wrapper, type):
        return wrap
    # A subclass, because timm decides by issubclass which arguments a wrapper gets.
    return type(wrapper.__name__, (wrapper,), {'__new__': lambda cls, model, **cfg: wrap(model, **cfg)})
