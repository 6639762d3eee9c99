"""Weights of variants: whose a file holds, and those that the base cannot load."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from timm.models import PretrainedCfg, load_state_dict, load_state_dict_from_hf
from timm.models._hub import HF_WEIGHTS_NAME
from torch import Tensor, nn

from sem_timm.compat import load_state_dict_from_path
from sem_timm.errors import OptionError
from sem_timm.layers.gate import with_current_keys
from sem_timm.operations import resolve_operation
from sem_timm.registry.variant_operation import VariantOperation

Weights = dict[str, Tensor]


def own_weights(cfg: PretrainedCfg, cache_dir: Any) -> Weights:
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
        where = {'cache_dir': cache_dir} if cache_dir else {}  # timm < 1.0.15 knows none
        weights = load_state_dict_from_hf(cfg.hf_hub_id, filename, **where)
    elif cfg.state_dict:
        weights = cfg.state_dict
    elif cfg.file:
        weights = load_state_dict(cfg.file)
    return weights


def split(weights: Weights, operation: VariantOperation) -> tuple[Weights, Weights]:
    """The entries of a state_dict that belong to inserted modules, and the others."""
    inserted = _of_inserted(weights, operation)
    return inserted, {key: weights[key] for key in weights if key not in inserted}


def without_variant(cfg: PretrainedCfg, architecture: str, name: str) -> OptionError:
    """The error about a saved model that says it is a variant, and has no weights of the modules that make it one."""
    where = f'file={cfg.file!r}' if cfg.file else f'hf_hub_id={cfg.hf_hub_id!r}'
    classes = f'num_classes={cfg.num_classes}'
    return OptionError(
        f'the saved model says that it is {name}, and its weights have none of the tensors that {name} adds to '
        f'{architecture}: it was unpatched, or patched otherwise, before it was saved.\n'
        f'  timm.create_model({architecture!r}, pretrained=True, {classes}, '
        f'pretrained_cfg_overlay=dict(source={cfg.source!r}, {where}, {classes})) gives the unpatched model back, and '
        f'the same with {name!r} puts new modules into it. Weights of one that was patched otherwise go by '
        'load_state_dict into a base that patch_model has patched so.'
    )


def _of_inserted(weights: Weights, operation: VariantOperation) -> Weights:
    child = resolve_operation(operation.name).attribute
    # Named sem, or sem1 and sem2 where one module has two, and sem_ where sem was taken.
    name = re.compile(rf'(^|\.){child}\d*_*\.')
    return {key: value for key, value in weights.items() if name.search(key)}


def load_inserted(model: nn.Module, inserted: Weights, name: str, operation: VariantOperation, *, strict: bool) -> None:
    """Loads the weights of the inserted modules; with ``strict`` all of them and no others.

    Raises:
        OptionError: If they do not fit.
    """
    expected = _of_inserted(model.state_dict(), operation)
    inserted = with_current_keys(inserted, expected)
    missing, unexpected = sorted(expected.keys() - inserted.keys()), sorted(inserted.keys() - expected.keys())
    reshaped = [key for key in sorted(expected.keys() & inserted.keys()) if expected[key].shape != inserted[key].shape]
    if reshaped or (strict and (missing or unexpected)):
        raise OptionError(
            f'The weights given for {name} were trained with other options: '
            f'{len(missing)} of its tensors are not among them{_example(missing)}, '
            f'{len(unexpected)} of theirs have no place in it{_example(unexpected)}, '
            f'{len(reshaped)} have another shape{_example(reshaped)}.\n'
            f'  Give the options of the training, such as {operation.prefix}target=..., to create_model.'
        )
    model.load_state_dict(inserted, strict=False)


def _example(keys: Iterable[str]) -> str:
    first = next(iter(keys), None)
    return f' ({first})' if first else ''


def restore_source(model: Any, cfg: PretrainedCfg) -> None:
    """Lets the record of the weights tell where they came from, and not hold them."""
    for record in (model.pretrained_cfg, model.default_cfg):
        record.pop('state_dict', None)
        if cfg.source:
            record['source'] = cfg.source
