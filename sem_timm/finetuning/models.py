"""The model of a run: created by timm, operated on, with a head for the data."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from sem_timm.errors import OptionError, SwapWarning, closest
from sem_timm.finetuning.errors import first_sentence
from sem_timm.finetuning.options import HEAD, NEW, NO_OPERATION, FinetuneOptions
from sem_timm.finetuning.packaged import PACKAGED, with_packaged_weights
from sem_timm.operations import patch_model
from sem_timm.persistence import save_patch
from sem_timm.persistence.parts import head_prefixes, new_prefixes
from sem_timm.surgery import patched_modules

_BUILT_IN_SIZE = 32


def create_model(options: FinetuneOptions, num_classes: int) -> nn.Module:
    """Creates the model that the options name, not yet operated on.

    Raises:
        OptionError: If there is no such model, its arguments do not fit, or its weights cannot be had.
    """
    name, tag = timm.models.split_model_name_tag(options.model)
    if not timm.is_model(name) and not options.model.startswith(('hf-hub:', 'local-dir:')):
        raise OptionError(f'model {options.model!r} is unknown. {closest(name, timm.list_models())}')
    if options.model_options.get('num_classes', num_classes) != num_classes:
        raise OptionError('model option num_classes is that of the data; for more than it has: --num-classes.')
    kwargs = {'num_classes': num_classes, **model_arguments(name, options.model_options, _image_size(options))}
    if options.weights in PACKAGED:
        return with_packaged_weights(_created(options, pretrained=False, **kwargs), options)
    if options.weights is not None:
        return _with_weights(options, options.weights, kwargs)
    pretrained = is_pretrained(options)
    if options.pretrained and not pretrained:
        raise OptionError(f'model {options.model!r} has no pretrained weights; list those that have: sem-timm list')
    if pretrained:
        _check_tag(name, tag)
    try:
        return _created(options, pretrained=pretrained, **kwargs)
    except Exception as error:  # the models, and the libraries that download, each have their own kinds
        what = f'model {options.model!r} cannot be created' + (' with pretrained weights' if pretrained else '')
        way = ' Without a network: --weights FILE, or --no-pretrained.' if pretrained else ''
        raise OptionError(f'{what}: {first_sentence(error)}.{way}') from error


def is_pretrained(options: FinetuneOptions) -> bool:
    """Whether a model begins with the weights that timm knows for it: by default if it has some, but for digits."""
    cfg = timm.get_pretrained_cfg(timm.models.split_model_name_tag(options.model)[0])
    wanted = not options.is_built_in if options.pretrained is None else options.pretrained
    return wanted and (cfg is None or bool(cfg.has_weights))


def model_arguments(name: str, given: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """The arguments of a model for images of a size: those given, and the size where timm builds the model for one.

    Args:
        name: Name of the model.
        given: Arguments that were asked for.
        image_size: Height and width of the images in pixels, if they were asked for.
    """
    cfg = timm.get_pretrained_cfg(name)
    is_fixed = cfg is not None and cfg.fixed_input_size and image_size is not None
    return {'img_size': image_size, **given} if is_fixed else dict(given)


def input_size(model: nn.Module, given: dict[str, Any], image_size: int | None) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images of a model that was created with arguments.

    Args:
        model: The model.
        given: Its arguments; the configuration that it keeps is that of its weights, whatever its channels.
        image_size: Height and width of the images in pixels; by default what the model asks for.
    """
    channels, height, width = resolve_data_config({}, model=model)['input_size']
    return given.get('in_chans') or channels, image_size or height, image_size or width


def _check_tag(name: str, tag: str) -> None:
    known = timm.list_pretrained(f'{name}.*')
    if tag and known and f'{name}.{tag}' not in known:
        tags = [other.partition('.')[2] for other in known]
        raise OptionError(f'model {name!r} has no pretrained weights with the tag {tag!r}. {closest(tag, tags)}')


def _created(options: FinetuneOptions, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)
        return timm.create_model(options.model, **kwargs)


def _with_weights(options: FinetuneOptions, file: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model with the weights of a file.

    Raises:
        OptionError: If the file cannot be read, or is of another model.
    """
    if not Path(file).is_file():
        raise OptionError(f'--weights {file}: there is no such file.')
    way = 'Give a state_dict of the base model, saved by safetensors or torch.save(model.state_dict(), FILE).'

    def loaded() -> nn.Module:
        return _created(options, pretrained=True, pretrained_cfg_overlay={'file': file}, **kwargs)

    state = torch.get_rng_state()
    try:
        without = _created(options, pretrained=False, **kwargs).state_dict()
        drawn_anew = loaded().state_dict()
        torch.set_rng_state(state)
        model = loaded()
    except Exception as error:  # the models and the libraries that read each have their own kinds
        raise OptionError(
            f'--weights {file} cannot be loaded into model {options.model!r}: {first_sentence(error)}. {way}'
        ) from error
    # timm takes what fits and logs the rest, be it all. The modules of a variant begin otherwise with weights anyway.
    new = new_prefixes(model)
    base = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(new)}
    if all(torch.equal(tensor, without[name]) for name, tensor in base.items()):
        raise OptionError(f'--weights {file} has no tensor that model {options.model!r} has. {way}')
    told: Any = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()  # which timm leaves out for other classes
    classifiers = (told,) if isinstance(told, str) else tuple(told)
    beside = (*new, *head_prefixes(model), *(f'{name}.' for name in classifiers))
    asked = [name for name, _ in model.named_parameters() if not name.startswith(beside)]
    missing = [name for name in asked if not torch.equal(base[name], drawn_anew[name])]
    if missing:
        what = (
            f'--weights {file} lacks {len(missing)} of {len(asked)} tensors of model {options.model!r}, such as '
            f'{missing[0]}, or has them in another shape'
        )
        if not options.model_options:
            raise OptionError(f'{what}. {way}')
        warnings.warn(f'{what}: they begin as they are drawn.', stacklevel=2)  # options may have added them
    return model


def _image_size(options: FinetuneOptions) -> int | None:
    return options.image_size or (_BUILT_IN_SIZE if options.is_built_in else None)


def data_config(model: nn.Module, options: FinetuneOptions) -> dict[str, Any]:
    """What timm's transforms are made from: size, mean and deviation of the model's images, and how they are cut."""
    given: dict[str, Any] = {'input_size': input_size(model, options.model_options, _image_size(options))}
    if options.is_built_in:
        given['crop_pct'] = 1.0  # digits and clothes fill their images
    config: dict[str, Any] = resolve_data_config(given, model=model)
    channels = config['input_size'][0]
    if channels not in (1, 3):
        raise OptionError(
            f'{type(model).__name__} takes images of {channels} channels; they are read as RGB or, for a model of one '
            'channel, as grey.'
        )
    for name in ('mean', 'std'):  # those of the weights, which may have been for other channels
        values = config[name]
        config[name] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def operation_name(model: nn.Module) -> str:
    """What was put into a model, for people to read."""
    return ' and '.join(dict.fromkeys(str(module.operation) for module in patched_modules(model))) or NO_OPERATION


def check_operation(model: nn.Module, options: FinetuneOptions) -> None:
    """Checks that a model which has been operated on is not asked to be so in another way.

    Raises:
        OptionError: If it is.
    """
    given = [name for name in ('target', 'exclude', 'operation_options') if getattr(options, name)]
    if options.operation not in (FinetuneOptions.operation, NO_OPERATION):
        given.insert(0, 'operation')
    if patched_modules(model) and given:
        raise OptionError(
            f'the model has {operation_name(model)} already, which {", ".join(given)} would not change. Leave that '
            'out, or give the base and the operation; of a variant, options of the operation are model options, such '
            'as sem_reduction=8 or ea_memory=32.'
        )


def operate(model: nn.Module, options: FinetuneOptions, shape: tuple[int, ...]) -> None:
    """Applies the operation of the options, but for a model that has been operated on before."""
    if options.operation == NO_OPERATION or patched_modules(model):
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)  # it is about to be trained
        patch_model(
            model,
            options.operation,
            target=options.target,
            exclude=options.exclude,
            input_size=shape,
            **options.operation_options,
        )


def inserted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that operations have added, by name."""
    prefixes = new_prefixes(model)
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}


def scale_head(model: nn.Module, factor: float) -> None:
    """Multiplies the weights and biases of the last layer, or layers, that give logits; in place.

    Raises:
        OptionError: If the model does not say which those are.
    """
    if factor == 1:
        return
    told: Any = getattr(model, 'get_classifier', None)
    heads = told() if callable(told) else ()
    layers = [
        layer
        for head in (heads if isinstance(heads, (tuple, list)) else (heads,))
        for layer in (head.modules() if isinstance(head, nn.Module) else ())
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    if not layers:
        raise OptionError(
            f'head_scale={factor:g}: {type(model).__name__} does not say by get_classifier() which layer is its head.'
        )
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.mul_(factor)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the classifier, by name; none where a model does not say which module that is."""
    heads = head_prefixes(model)
    return {name: p for name, p in model.named_parameters() if heads and name.startswith(heads)}


def save_if_patch(model: nn.Module, options: FinetuneOptions, folder: str | os.PathLike[str]) -> bool:
    """Saves a patch where that is all that was trained: what was put in, and the head if the model tells which it is.

    Args:
        model: The trained model.
        options: Those of its run.
        folder: The folder of the patch.

    Returns:
        Whether it is all, and was saved.

    Raises:
        ModelError: If no file can hold what was put in.
    """
    if not options.trained_parts <= {NEW, HEAD} or not patched_modules(model):
        return False
    save_patch(model, folder, include_head=bool(head_parameters(model)))
    return True
