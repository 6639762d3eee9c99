"""`save_patch`: what was put into a model, as two small files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.errors import ModelError, OptionError, closest
from sem_timm.operations import AttentionConfig, InsertionConfig
from sem_timm.persistence.fingerprint import fingerprint, fingerprints, is_compared
from sem_timm.persistence.parts import Parts, parts_of
from sem_timm.persistence.record import PARTS, Base, PatchRecord, Step, site_record, tensor_record
from sem_timm.persistence.weights_file import check_folder, encode, write
from sem_timm.registry import base_architecture
from sem_timm.surgery import check_undoable, noted_statistics, patched_modules

# Where wrappers keep the model; they change neither its classes nor its tensors.
_INSIDE = {
    'DistributedDataParallel': 'module',
    'DataParallel': 'module',
    'OptimizedModule': '_orig_mod',
    'ModelEmaV2': 'module',
    'ModelEmaV3': 'module',
}
_SPREAD = ('FullyShardedDataParallel', 'FSDPModule')

State = nn.Module | Mapping[str, Tensor]


def save_patch(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    include_head: bool = False,
    base: State | None = None,
    include_changed_base: bool = False,
    prefix: str | None = None,
) -> Path:
    """Saves what was put into a model, without the model: ``patch.json`` and one safetensors file.

    `load_patch` puts it into any model of the same network. The files hold the options of the operations, their sites,
    the tensors of the new modules, the running statistics of norms where they have moved since the model was patched,
    and fingerprints of the other base weights, so that loading onto others is noticed. They are replaced all at once:
    whatever goes wrong, the folder holds the new patch or the one it held before.

    Args:
        model: The patched model; one that is wrapped in DDP, ``torch.compile`` or timm's EMA is unwrapped. In a
            distributed run, call it in one process.
        folder: Where to; made if it is not there.
        include_head: Whether to save the classifier too, as needed after training for other classes.
        base: The model before training, which is unwrapped too, or its state_dict. With it, base weights that have
            changed since are noticed; without it, the patch is one for the base weights that the model has now.
        include_changed_base: Whether to save those; needs ``base``.
        prefix: Name of the part of the model that is saved, such as 'encoder.model': the network without what is around
            it, in ``base`` too. Then `load_patch` puts it into that network wherever it is.

    Returns:
        The folder.

    Raises:
        ModelError: If the model is not patched, lost its unread parameters, is sharded, on the meta device or changed
            by PEFT, or was patched with code or numbers that a file cannot have.
        OptionError: If the base weights have changed and are not included, or the arguments do not go together.
        PatchFileError: If a file is where the folder is to be.
        OSError: If the files cannot be written.
    """
    check_folder(Path(folder))
    model = part_of(_unwrapped(model), prefix)
    if prefix is not None and base is not None:
        base = _part_of_base(base, prefix)
    steps = steps_of(model)
    parts = parts_of(model)
    if include_head and not parts.head:
        raise OptionError(f'include_head=True, but {type(model).__name__} has no classifier that timm could name.')
    changed = _changed(parts, base, include_changed_base, noted_statistics(model))
    included = Parts(parts.new, parts.head if include_head else {}, changed)
    kept = {name: tensor for name, tensor in parts.base.items() if name not in changed}
    tensors = {part: getattr(included, part) for part in PARTS}
    weights, data = encode({name: tensor for part in tensors.values() for name, tensor in part.items()})
    told = {name: tensor_record(part, tensor) for part, named in tensors.items() for name, tensor in named.items()}
    record = PatchRecord(versions(), base_of(model), steps, told, fingerprints(kept), weights)
    write(Path(folder), record, data)
    return Path(folder)


def part_of(model: nn.Module, prefix: str | None) -> nn.Module:
    """The module of a model that ``prefix`` names, with a dot at its end or without; without a prefix the model.

    Raises:
        OptionError: If there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    name = (prefix or '').removesuffix('.')
    if name not in modules:
        raise OptionError(f'prefix={prefix!r} is no module of {type(model).__name__}. {closest(name, modules)}')
    return modules[name]


def _part_of_base(base: State, prefix: str) -> State:
    if isinstance(base, nn.Module):
        return part_of(_unwrapped(base), prefix)
    start = prefix.removesuffix('.') + '.'
    return {name.removeprefix(start): tensor for name, tensor in dict(base).items() if name.startswith(start)}


def versions() -> dict[str, str]:
    """What is noted beside what was made: the versions of sem_timm, timm and torch."""
    return {'sem_timm': sem_timm.__version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}


def _unwrapped(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f'a torch.nn.Module is needed, not {type(model).__name__}.')
    while (
        inside := next((_INSIDE[c.__name__] for c in type(model).__mro__ if c.__name__ in _INSIDE), None)
    ) is not None:
        model = getattr(model, inside)
    for name, module in model.named_modules():
        if any(cls.__name__ in _SPREAD for cls in type(module).__mro__):
            raise ModelError(
                f'{name or "the model"} is sharded by FSDP. Gather its state_dict, load that into an unsharded model '
                'that is patched the same way, and save that one.'
            )
        if _is_of_peft(module):
            raise ModelError(
                f'{name or "the model"} is a {type(module).__name__} of PEFT, so that names and weights of the model '
                'are not its own.\n'
                '  merge_and_unload() of the PEFT model gives back the patched model with the adapters merged into its '
                'weights (save that with base= and include_changed_base=True), unload() the one without them, and '
                'where nothing was put inside the model, as with prompts, get_base_model() the one inside.'
            )
    return model


def _is_of_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's: by its class, or by the layer inside and the adapters around it."""
    own = any(cls.__module__.partition('.')[0] == 'peft' for cls in type(module).__mro__)
    return own or ('base_layer' in module._modules and hasattr(module, 'active_adapters'))


def steps_of(model: nn.Module) -> tuple[Step, ...]:
    """The operations on a model, in their order, as `load_patch` repeats them.

    Raises:
        ModelError: If it was not operated on, or no longer is what the operations made of it.
    """
    if not patched_modules(model):
        raise ModelError(f'{type(model).__name__} is not patched, or switched off; patch_model(model) first.')
    try:
        check_undoable(model)
    except ModelError as error:
        raise ModelError(f'its patch cannot be saved: {error}') from error
    steps: dict[Any, Step] = {}
    for part in sorted(patched_modules(model), key=lambda part: part.number):
        for site in part.sites:
            config = cast('InsertionConfig | AttentionConfig', part.operation)
            if isinstance(config, InsertionConfig) and site.position == 'output':
                # Asked for by the name of a sequence, 'auto' takes the output of its last block; by that block's own
                # name it would take the branch.
                config = replace(config, position='output')
            key = part.number, config
            step = steps.get(key) or Step(config, tuple(part.input_size), ())
            steps[key] = replace(step, sites=(*step.sites, site_record(site, part.name)))
    return tuple(steps.values())


def base_of(model: nn.Module) -> Base:
    """What timm calls the model under the patch."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    architecture, tag = cfg.get('architecture'), cfg.get('tag')
    return Base(base_architecture(architecture) if architecture else None, tag or None, type(model).__name__)


def _changed(parts: Parts, base: State | None, include: bool, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base tensors to be saved: statistics that have moved, and if it is asked for, all that ``base`` has not."""
    if base is None:
        if include:
            raise OptionError('include_changed_base=True needs base=, the model before training or its state_dict.')
        moved = {n for n in statistics if n in parts.base and _differs(n, parts.base[n], statistics)}
        return {name: tensor for name, tensor in parts.base.items() if name in moved | _counters(moved)}
    if not isinstance(base, (nn.Module, Mapping)):
        raise OptionError(f'base={base!r} is no model and no state_dict; timm.models.load_state_dict(file) reads one.')
    before = dict(_unwrapped(base).state_dict() if isinstance(base, nn.Module) else base)
    changed = {name: tensor for name, tensor in parts.base.items() if _differs(name, tensor, before)}
    seen = [name for name in changed if is_compared(name) and name not in statistics]
    if seen and not include:
        raise OptionError(
            f'{len(seen)} of {len(parts.base)} base tensors have changed since base, such as {seen[0]}, and the patch '
            'alone would not give this model back.\n'
            '  include_changed_base=True saves them too; without base= the patch is one for the weights of now.'
        )
    return changed


def _counters(statistics: set[str]) -> set[str]:
    """What counts the batches that statistics are of, which is next to them."""
    return {f'{name.rpartition(".")[0]}.num_batches_tracked'.removeprefix('.') for name in statistics}


def _differs(name: str, tensor: Tensor, before: dict[str, Any]) -> bool:
    old = before.get(name)
    if not isinstance(old, Tensor) or old.shape != tensor.shape:
        found = (
            'has none' if old is None else f'has {tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__}'
        )
        raise OptionError(f'base is not the base of this model: for {name} {tuple(tensor.shape)} it {found}.')
    if old.is_meta:
        raise OptionError(f'base has no values: its {name} is on the meta device.')
    if old.dtype == tensor.dtype:
        return not torch.equal(old.to(tensor.device), tensor)
    return fingerprint(old).compare(tensor) is not None
