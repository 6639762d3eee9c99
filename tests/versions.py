"""What older versions of torch and timm cannot do, or do under other names: the one place of the tests that asks."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from timm.models import _registry
from torch import nn

from sem_timm.compat import TELLS_SAVED_TENSORS_HOOKS
from sem_timm.errors import MissingPackageError

TORCH = Version(torch.__version__).release
TIMM = Version(timm.__version__).release

# The newest timm of which all architectures that the tests name were tried.
_COMPLETE = (1, 0, 31)


# Whether ConViT keeps positions in an attribute that its forward changes, for which it is refused; later in a buffer.
CONVIT_CHANGES_ITSELF = TIMM < (1, 0, 31)

# Whether Swin's tables of positions stay frozen as they are made anew for other sizes.
TABLES_STAY_FROZEN = TIMM >= (1, 0, 31)

# Whether gradient checkpointing of timm runs a block the first time without gradients, where a gate multiplies and adds
# in one step, and rounds once.
CHECKPOINTS_WITHOUT_GRADIENTS = not hasattr(timm.layers, 'use_reentrant_ckpt')

# The indices of the outputs of its first two stages among ConvNeXt's intermediates, where the stem was the first.
CONVNEXT_STAGES = (0, 1) if TIMM >= (1, 0, 16) else (1, 2)

# What builds a small `efficientvit_m0` for the sizes it is tested with: before, it took images of no other than one.
_EFFICIENTVIT = {'depth': (1, 1, 2), 'num_heads': (2, 2, 2)}
EFFICIENTVIT: dict[str, Any] = (
    {'options': _EFFICIENTVIT}
    if TIMM >= (1, 0, 31)
    else {'size': 128, 'options': {**_EFFICIENTVIT, 'img_size': 128}, 'other_size': None}
)


def since_timm(release: str, what: str) -> pytest.MarkDecorator:
    """Marks a test of what timm has since a release."""
    return pytest.mark.skipif(Version(release).release > TIMM, reason=f'timm {timm.__version__} has no {what}')


def since_torch(release: str, what: str) -> pytest.MarkDecorator:
    """Marks a test of what torch has, or can do, since a release."""
    return pytest.mark.skipif(Version(release).release > TORCH, reason=f'torch {torch.__version__} has no {what}')


def needs_argument(name: str) -> pytest.MarkDecorator:
    """Marks a test that hands an argument to timm's attention, which has it since some release."""
    return pytest.mark.skipif(not attention_takes(name), reason=_no_argument(name))


def attention_takes(name: str) -> bool:
    """Whether timm's attention takes an argument of that name."""
    return name in inspect.signature(Attention.forward).parameters


def _no_argument(name: str) -> str:
    return f'timm {timm.__version__} has no argument {name} of its attention'


def class_name(cls: type) -> str:
    """Module and name of a class of timm, without "timm." and as the newest timm has it."""
    return (
        'layers.attention.Attention' if cls is Attention else f'{cls.__module__}.{cls.__name__}'.removeprefix('timm.')
    )


# Where `timm.create_model` gives a model that was saved in a folder the arguments that it was made with.
saves_arguments = pytest.mark.skipif(
    not hasattr(timm.models._hub, 'get_model_args'),
    reason=f'timm {timm.__version__} does not save the arguments of a model',
)

# Where a gate may look up what is kept.
tells_saved_tensors_hooks = pytest.mark.skipif(
    not TELLS_SAVED_TENSORS_HOOKS,
    reason=f'torch {torch.__version__} does not tell the hooks of saved tensors',
)


def free_batch() -> Any:
    """A batch of any size for `torch.export`; some torch before 2.9 takes none for what has no largest."""
    return torch.export.Dim('batch', max=None if TORCH >= (2, 9) else 1024)


def unless_timm_fails(plainly: Callable[[], Any]) -> None:
    """Ends a test that an older timm cannot pass: it fails with the plain model already, which this does."""
    try:
        plainly()
    except Exception as error:
        if TIMM >= _COMPLETE:
            raise
        pytest.skip(f'timm {timm.__version__} itself: {type(error).__name__}: {error}')


def lacking(error: BaseException | None) -> str:
    """Why a test cannot run with an older timm: that lacks an architecture, an option, or what is needed of it here."""
    if TIMM >= _COMPLETE or error is None:
        return ''
    text = str(error).partition('\n')[0]
    if isinstance(error, MissingPackageError):
        return text
    if type(error).__name__ == 'UnpatchedFails':  # of tests/compatibility/twins.py
        return f'timm {timm.__version__} itself: {text}'
    unknown = re.search(
        r"(?:Unknown model \(|model ')(\w+)(?:\)|' is unknown)", str(error)
    )  # in what another process printed, too
    if unknown is not None:
        name = re.sub('_(sem|ea|eamlp)$', '', unknown[1])
        known = timm.is_model(name) and timm.model_entrypoint(name).__module__ != 'tests.small_models'
        return '' if known else f'timm {timm.__version__} has no {name}'
    argument = re.search(r"forward\w*\(\) got an unexpected keyword argument '(attn_mask|is_causal)'", str(error))
    if argument is not None and not attention_takes(argument[1]):
        return _no_argument(argument[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if '/torch/' not in frame.filename]
    if not frames or '/timm/' not in frames[-1].filename:
        return ''
    last = frames[-1]
    if last.name == 'parse_model_name':
        return f'timm {timm.__version__} has no models of local-dir:'
    if isinstance(error, TypeError) and re.search('unexpected keyword|multiple values', text):
        return f'timm {timm.__version__} itself: {text}'
    if isinstance(error, RuntimeError) and 'meta tensor' in text:
        return f'timm {timm.__version__} itself cannot build all models on the meta device'
    return ''


def clear_model_entries(name: str) -> None:
    """Takes an architecture out of timm's registry, which has a function for it since timm 1.0.31."""
    if hasattr(_registry, '_clear_model_entries'):
        _registry._clear_model_entries(name)
        return
    tagged = [entry for entry in _registry._model_pretrained_cfgs if entry.partition('.')[0] == name]
    for store in (_registry._model_pretrained_cfgs, _registry._model_entrypoints, _registry._model_to_module):
        for entry in (name, *tagged):
            store.pop(entry, None)
    for store in (_registry._model_with_tags, getattr(_registry, '_model_default_cfgs', {})):
        store.pop(name, None)
    _registry._model_has_pretrained.difference_update((name, *tagged))
    for names in _registry._module_to_models.values():
        names.discard(name)


def weightless(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A model of timm on the meta device, where timm before 1.0.21 has no argument for it."""
    if TIMM >= (1, 0, 21):
        return timm.create_model(name, device='meta', dtype=dtype, **options)
    return timm.create_model(name, **options).to('meta', dtype)


def building_weightless() -> AbstractContextManager[Any]:
    """A context in which models are built on the meta device, where all of timm's can be, since timm 1.0.20."""
    return torch.device('meta') if TIMM >= (1, 0, 20) else nullcontext()


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module at a name, for which torch has a method since 2.5."""
    path, _, child = name.rpartition('.')
    setattr(model.get_submodule(path), child, new)


def compiles_once_more(allowed: bool) -> AbstractContextManager[Any]:
    """A context in which torch.compile compiles what is new to it, or else raises."""
    if allowed:
        return nullcontext()
    if TORCH >= (2, 6):
        return torch.compiler.set_stance('fail_on_recompile')
    return torch._dynamo.config.patch(error_on_recompile=True)


def without_compiled_files() -> AbstractContextManager[Any]:
    """A context in which torch.compile does not look on the disk for what was compiled before."""
    if TORCH >= (2, 7):
        import torch.compiler.config

        return torch.compiler.config.patch(force_disable_caches=True)
    import torch._inductor.config

    return torch._inductor.config.patch(force_disable_caches=True)


def fully_shard(module: nn.Module, **kwargs: Any) -> nn.Module:
    """FSDP2, which was private before torch 2.6."""
    if TORCH >= (2, 6):
        from torch.distributed import fsdp
    else:
        from torch.distributed._composable import fsdp
    sharded: nn.Module = fsdp.fully_shard(module, **kwargs)
    return sharded


try:
    from timm.layers import Attention, AttentionRope
except ImportError:  # timm < 1.0.16
    from timm.models.eva import EvaAttention as AttentionRope
    from timm.models.vision_transformer import Attention

try:
    from timm.models import save_for_hf
except ImportError:  # timm < 1.0.16
    from timm.models._hub import save_for_hf

__all__ = ['Attention', 'AttentionRope', 'save_for_hf']
