"""`load_patch`: plans a saved patch anew on a live model, and gives it the saved values; all of it or nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.errors import ModelError, PatchFileError, SemTimmError, SwapWarning, check_choice, closest
from sem_timm.layers.gate import with_current_keys
from sem_timm.layers.operators import registered_name
from sem_timm.meta import probe
from sem_timm.operations import AttentionConfig, ExcitationConfig, SEMConfig, plan_model
from sem_timm.persistence.base_check import check_base_weights
from sem_timm.persistence.configurations import Config
from sem_timm.persistence.parts import Parts, check_tensors, parts_of
from sem_timm.persistence.record import PARTS, RECORD_NAME, PatchRecord, SiteRecord, Step, read_record, site_record
from sem_timm.persistence.same_network import MISSING, network_of
from sem_timm.persistence.save import base_of, part_of, steps_of
from sem_timm.persistence.weights_file import read_tensors
from sem_timm.random_state import preserved_random_state
from sem_timm.surgery import Plan, apply_plan, check_model, patched_modules, unpatch_model

CHECKS = ('warn', 'error', 'ignore')


def load_patch(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    check_base: str = 'warn',
    input_size: tuple[int, ...] | None = None,
    prefix: str | None = None,
    missing: str = 'error',
) -> nn.Module:
    """Puts a saved patch into a model in place, all of it or nothing; `unpatch_model` takes it out again.

    Nothing in the files is executed or unpickled: the operations are planned anew on the model, and what the plan
    builds must be what the files describe. No random number is drawn. A saved classifier and changed base weights
    overwrite the model's; undoing does not bring the old values back.

    Args:
        model: The network that the patch was saved from, of whatever class: as a classifier, as a feature backbone of
            timm's or inside of a larger model. It has no patch, or, as timm's variants such as ``resnet50_sem`` do, the
            same one with other values.
        folder: What `save_patch` wrote.
        check_base: What happens if the base weights, classifier aside, are not those that the patch was saved with:
            'warn', 'error' or 'ignore'. Weights that were merely cast to another type are the same.
        input_size: Shape (C, H, W) of one input image, where neither the model nor the patch knows a good one.
        prefix: Name of the part of the model that is the network, such as 'encoder.model', where several are.
        missing: What happens if the model lacks blocks at the end of the network, or the classifier, and the patch has
            values for them: 'error', or 'skip' to leave those out.

    Returns:
        The model.

    Warns:
        BaseWeightsWarning: If the base weights are others, with ``check_base='warn'``.

    Raises:
        PatchFileError: If a file is missing, damaged or newer, or does not fit the model; or its base weights, with
            ``check_base='error'``. The message names the file and the field.
        ModelError: If the model is wrapped, on the meta device, or patched otherwise.
        OptionError: If ``check_base``, ``prefix`` or ``missing`` is unknown, or the model does not take images of
            ``input_size``.
    """
    check_choice('check_base', check_base, CHECKS)
    check_choice('missing', missing, MISSING)
    check_model(model)
    check_tensors(model, model.state_dict())
    folder = Path(folder)
    file, whole = folder / RECORD_NAME, read_record(folder)
    tensors = read_tensors(folder, whole)
    given = part_of(model, prefix)
    _check_architecture(given, file, whole)
    network = network_of(given, whole, file, missing)
    part, record = network.module, network.record
    _check_architecture(part, file, record)
    tensors = network.renamed(tensors)
    with _all_or_nothing(part):
        if patched_modules(part):
            _check_same_patch(part, file, record)
        else:
            if input_size is not None:
                probe(part, input_size)  # an error that blames the argument, and not the file
            for number, step in enumerate(record.steps):
                _apply(part, step, record, f'{file}: operations[{number}]', input_size)
        parts = parts_of(part)
        record = replace(record, tensors=with_current_keys(record.tensors, parts.new))
        tensors = with_current_keys(tensors, parts.new)
        _check_tensors_fit(parts, tensors, record, file)
        check_base_weights(network.shared(parts.base), record, file, check_base)
        _set_values(part, {**parts.new, **parts.head, **parts.base}, tensors, file)
    return model


def _check_architecture(network: nn.Module, file: Path, record: PatchRecord) -> None:
    """Raises PatchFileError for a model of another architecture, as far as architectures have names."""
    there, here = record.base.architecture, base_of(network).architecture
    if there and here and there != here:
        made = f'timm.create_model({there!r})'
        raise PatchFileError(
            f'{file}: base.architecture: the patch is for {there!r}, and this model is a {here!r}. Load it into {made}.'
        )


def _check_same_patch(model: nn.Module, file: Path, record: PatchRecord) -> None:
    steps = steps_of(model)
    here, there = _by_site(steps), _by_site(record.steps)
    if here != there:
        raise ModelError(
            f'this {type(model).__name__} is patched already, and not as {file} says: {_listed(steps)} here, '
            f'{_listed(record.steps)} there{_first_difference(here, there)}.\n  unpatch_model(model) first.'
        )


_Made = dict[tuple[str, str], tuple[Config, SiteRecord]]


def _by_site(steps: tuple[Step, ...]) -> _Made:
    """What was made where; equal if the same was, whichever options led to it."""
    return {(site.name, site.attribute): (_normal(step.config), site) for step in steps for site in step.sites}


def _normal(config: Config) -> Config:
    """A configuration without what its sites and values tell anyway, in the words that a file has for the rest."""
    if isinstance(config, AttentionConfig):
        return config.with_defaults()
    config = replace(config, position='auto', branches='last')
    if isinstance(config, (SEMConfig, ExcitationConfig)):
        # The form of a gate is among its values; this one works with any operator.
        config = replace(config, init='paper')
    if isinstance(config, SEMConfig):
        config = replace(config, operators=tuple(registered_name(o) or o for o in config.operators))
    return config


def _first_difference(here: _Made, there: _Made) -> str:
    """The end of a message: the first site that is in only one of two patches, or else the first other option."""
    for name, attribute in here | there:
        if ((name, attribute) in here) != ((name, attribute) in there):
            return f'; {name}.{attribute} is only {"here" if (name, attribute) in here else "there"}'
    for key in here:
        mine, other = _told(*here[key]), _told(*there[key])
        for option in mine | other:
            if mine.get(option) != other.get(option):
                return f'; {".".join(key)} has {option}={mine.get(option)!r} here and {other.get(option)!r} there'
    return ''


def _told(config: Config, site: SiteRecord) -> dict[str, Any]:
    return {'operation': str(config), **config.to_dict(), **asdict(site), 'shape': None}  # which is not compared


def _listed(steps: tuple[Step, ...]) -> str:
    return ', '.join(f'{step.config} at {len(step.sites)} sites' for step in steps)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undoes patches and what they froze if anything fails; leaves the random generators alone in any case.

    Values are not touched before all is checked, and are put back where they are touched.
    """
    had_patch = bool(patched_modules(model))
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with preserved_random_state():
            yield
    except BaseException:
        if patched_modules(model) and not had_patch:
            unpatch_model(model)
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        raise


def _apply(model: nn.Module, step: Step, record: PatchRecord, place: str, input_size: tuple[int, ...] | None) -> None:
    known = dict(model.named_modules())
    for number, site in enumerate(step.sites):
        if site.name not in known:
            raise PatchFileError(
                f'{place}.sites[{number}].name: {site.name!r} is no module of this {type(model).__name__}. '
                f'{closest(site.name, known)}'
            )
    try:
        plan = _planned(model, step, input_size)
    except SemTimmError as error:
        raise PatchFileError(f'{place} does not fit this {type(model).__name__}: {error}') from error
    _compare(plan, step.sites, place)
    _check_sizes(plan, record, place)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)  # the weights that come have been trained
        apply_plan(model, plan)


def _planned(model: nn.Module, step: Step, input_size: tuple[int, ...] | None) -> Plan:
    names = {site.name for site in step.sites}

    def chosen(name: str, module: nn.Module) -> bool:
        return name in names

    try:
        return plan_model(model, step.config, target=chosen, input_size=input_size)
    except ModelError:
        if input_size is not None or not step.input_size:
            raise
        return plan_model(model, step.config, target=chosen, input_size=step.input_size)  # where the model has none


def _compare(plan: Plan, sites: tuple[SiteRecord, ...], place: str) -> None:
    """Raises PatchFileError unless a plan has exactly the recorded sites."""
    planned = {(site.name, site.attribute): site_record(site) for site in plan}
    refusals = {refusal.name: refusal.reason for refusal in plan.refusals}
    for number, site in enumerate(sites):
        found, where = planned.pop((site.name, site.attribute), None), f'{place}.sites[{number}]'
        if found is None:
            others = [attribute for name, attribute in planned if name == site.name]
            why = refusals.get(site.name) or (
                f'the new child is named {others[0]!r} here' if others else 'it is no site'
            )
            raise PatchFileError(
                f'{where}: {site.name}.{site.attribute} cannot be made in this {plan.model_name}: {why}.'
            )
        if found != site:
            here, there = asdict(found), asdict(site)
            for told in (here, there):  # a number of parameters follows from the rest, so it is told last
                told.update(told.pop('widths'), num_parameters=told.pop('num_parameters'))
            name = next(name for name in here if name != 'shape' and here[name] != there.get(name))
            raise PatchFileError(
                f'{where}.{name}: {site.name} has {here[name]!r} in this {plan.model_name}, and {there.get(name)!r} in '
                'the patch.'
            )
    for name, attribute in planned:
        raise PatchFileError(f'{place}.sites: lacks {name}.{attribute}, which the operation makes in this model.')


def _check_sizes(plan: Plan, record: PatchRecord, place: str) -> None:
    """Raises PatchFileError if values are missing for what is to be built, before memory is given to it."""
    for site in plan:
        prefix = f'{site.name}.{site.attribute}.'
        sizes = (torch.Size(tensor.shape).numel() for name, tensor in record.tensors.items() if name.startswith(prefix))
        if sum(sizes) < site.num_parameters:
            raise PatchFileError(
                f'{place}: {prefix[:-1]} has {site.num_parameters:,} parameters, and tensors has fewer values for it.'
            )


def _check_tensors_fit(parts: Parts, tensors: dict[str, Tensor], record: PatchRecord, file: Path) -> None:
    """Raises PatchFileError unless each part has the names, shapes and kinds of types that the model has there."""
    here = {name: (part, tensor) for part in PARTS for name, tensor in getattr(parts, part).items()}
    for name, tensor in tensors.items():
        place, part = f'{file}: tensors.{name}', record.tensors[name].part
        if name not in here:
            raise PatchFileError(f'{place}: no tensor of the model. {closest(name, here)}')
        own_part, own = here[name]
        if part != own_part:
            raise PatchFileError(f'{place}.part: the model has it in {own_part}, not in {part}.')
        if tensor.shape != own.shape:
            hint = ' reset_classifier(num_classes) makes one that fits.' if part == 'head' else ''
            raise PatchFileError(
                f'{place}.shape: {tuple(tensor.shape)}, and the model has {tuple(own.shape)} there.{hint}'
            )
        if tensor.dtype != own.dtype and not (tensor.is_floating_point() and own.is_floating_point()):
            raise PatchFileError(f'{place}.dtype: {tensor.dtype}, and the model has {own.dtype} there.')
    whole = {'new', *(tensor.part for tensor in record.tensors.values())} - {'base'}
    for name, (part, _) in here.items():
        if part in whole and name not in tensors:
            raise PatchFileError(f'{file}: tensors: {name!r} is missing, and the model has it.')


def _set_values(model: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor], file: Path) -> None:
    before = {name: old[name].clone() for name in new}
    try:
        model.load_state_dict(new, strict=False)
    except BaseException as error:
        model.load_state_dict(before, strict=False)
        if isinstance(error, Exception):  # a value that a module does not take
            raise PatchFileError(f'{file}: the tensors cannot be loaded: {error}') from error
        raise
