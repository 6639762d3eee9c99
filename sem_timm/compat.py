"""Names that older versions of timm and torch have elsewhere, or not at all: the one place that knows of versions.

The newest version comes first in each, so that what is there for older ones can be removed when they no longer matter.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import SEModule
from timm.layers import create_attn as _create_attn
from timm.models import PretrainedCfg, get_pretrained_cfg, split_model_name_tag
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import Tensor, fx, nn

from sem_timm.errors import MissingPackageError
from sem_timm.random_state import preserved_random_state

try:
    from timm.models import get_arch_pretrained_cfgs
except ImportError:  # timm < 1.0.10

    def get_arch_pretrained_cfgs(model_name: str) -> dict[str, PretrainedCfg]:
        """Copies of the pretrained cfgs of an architecture by name with tag, the default first."""
        from timm.models._registry import _model_with_tags

        names = _model_with_tags.get(split_model_name_tag(model_name)[0], [])
        return {name: cfg for name in names if (cfg := get_pretrained_cfg(name)) is not None}


try:
    from timm.layers import get_notrace_functions
except ImportError:  # timm < 1.0.17
    from timm.models._features_fx import get_notrace_functions

try:
    from torch.compiler import is_exporting
except ImportError:  # torch < 2.7, which does not tell an export from other compilation
    from torch.compiler import is_compiling as is_exporting

_TIMM = tuple(map(int, re.findall(r'\d+', timm.__version__)[:3]))
_TORCH = tuple(map(int, torch.__version__.split('.')[:2]))

# Functions of torch whose arguments are lists of tensors, or a device. Before torch 2.9 they take no proxy there.
_REFUSING_PROXIES = (
    *(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack),
    *(
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.zeros,
    ),
    *(torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.zeros_like),
)
REFUSING_PROXIES: tuple[Callable[..., Any], ...] = () if _TORCH >= (2, 9) else _REFUSING_PROXIES

__all__ = [
    'REFUSING_PROXIES',
    'TELLS_SAVED_TENSORS_HOOKS',
    'buffers_take_proxies',
    'create_attn',
    'create_norm',
    'create_scheduler',
    'forget_compiled',
    'get_arch_pretrained_cfgs',
    'get_notrace_functions',
    'is_exporting',
    'list_optimizers',
    'load_state_dict_from_path',
    'logit_distillation_task',
    'may_hook_saved_tensors',
    'meta_is_checkpointed',
    'on_meta',
    'param_groups_layer_decay',
    'param_groups_weight_decay',
    'saved_tensors_hooks_in_force',
    'wrapper_arguments',
]


def create_attn(
    name: str, channels: int, device: torch.device | str | None, dtype: torch.dtype | None, **options: Any
) -> Any:
    """One of timm's attention modules, where and of the type that was asked for."""
    return _placed(partial(_create_attn, name, channels, **options), device, dtype)


def create_norm(
    norm_layer: Callable[..., nn.Module], width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """One of timm's norms, or another with the same arguments, where and of the type that was asked for."""
    norm: nn.Module = _placed(partial(norm_layer, width), device, dtype)
    return norm


def _placed(build: Callable[..., Any], device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if 'device' in inspect.signature(SEModule).parameters:
        return build(device=device, dtype=dtype)
    with nullcontext() if device is None else torch.device(device):  # timm < 1.0.21
        return build().to(dtype=dtype)


def wrapper_arguments(wrapper: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What timm hands to a feature wrapper; before 1.0.31 it hands more to a class than to what it knows by name."""
    if _TIMM >= (1, 0, 31) or not isinstance(wrapper, type):
        return arguments
    foreign = set() if issubclass(wrapper, (FeatureDictNet, FeatureHookNet)) else {'flatten_sequential'}
    foreign |= {'output_fmt'} if issubclass(wrapper, FeatureGetterNet) else set()
    return {name: value for name, value in arguments.items() if name not in foreign}


def load_state_dict_from_path(folder: str) -> dict[str, Tensor]:
    """The weights in a folder.

    Raises:
        MissingPackageError: If this timm cannot read them.
    """
    try:
        from timm.models._hub import load_state_dict_from_path
    except ImportError as error:  # timm < 1.0.16
        raise MissingPackageError(
            f"source='local-dir' is for folders, which timm {timm.__version__} cannot read. "
            f"Do: pip install 'timm>=1.0.16', or name a file: pretrained_cfg_overlay=dict(file=...)."
        ) from error
    weights: dict[str, Tensor] = load_state_dict_from_path(Path(folder))  # timm < 1.0.23 takes no text
    return weights


def _optim() -> Any:
    """timm's room of optimizers, which is loaded when it is asked for and not with this package."""
    import timm.optim

    return timm.optim


def param_groups_layer_decay(*args: Any, **options: Any) -> list[dict[str, Any]]:
    """timm's groups of parameters with a learning rate for each layer."""
    return _param_groups('param_groups_layer_decay', *args, **options)


def param_groups_weight_decay(*args: Any, **options: Any) -> list[dict[str, Any]]:
    """timm's groups of parameters with and without weight decay."""
    return _param_groups('param_groups_weight_decay', *args, **options)


def _param_groups(name: str, *args: Any, **options: Any) -> list[dict[str, Any]]:
    optim = _optim()
    home = optim if hasattr(optim, name) else optim.optim_factory  # timm < 1.0.12
    groups: list[dict[str, Any]] = getattr(home, name)(*args, **options)
    return groups


def list_optimizers() -> list[str]:
    """Names of all optimizers that timm makes."""
    optim = _optim()
    listed = getattr(optim, 'list_optimizers', None)
    if listed is None:  # timm < 1.0.12 has an if-chain
        return re.findall(r"opt_lower == '(\w+)'", inspect.getsource(optim.create_optimizer_v2))
    return [str(name) for name in listed()]


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What is built, on the meta device: without weights, memory or random numbers."""
    try:
        with torch.device('meta'):
            return build()
    except RuntimeError as error:
        if 'meta tensor' not in str(error):
            raise
    with preserved_random_state():  # timm < 1.0.20 asks tensors for numbers as it builds: there with weights at first
        return build().to('meta')


def buffers_take_proxies() -> AbstractContextManager[None]:
    """A context in which a traced forward may set a buffer, for which torch takes no proxy, 2.6 for one."""
    if _TORCH >= (2, 9):
        return nullcontext()
    original = nn.Module.__setattr__

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in self.__dict__.get('_buffers', ()):
            self.__dict__['_buffers'][name] = value
        else:
            original(self, name, value)

    return _replaced(nn.Module, '__setattr__', set_attribute)


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def meta_is_checkpointed() -> AbstractContextManager[Any]:
    """A context in which calls on the meta device may be checkpointed, which torch 2.4 takes for an accelerator."""
    if _TORCH >= (2, 5):
        return nullcontext()
    from torch.utils import checkpoint

    infer = checkpoint._infer_device_type

    def infer_device_type(*args: Any) -> str:
        return 'cpu' if (device := infer(*args)) == 'meta' else str(device)

    return _replaced(checkpoint, '_infer_device_type', infer_device_type)


def create_scheduler(optimizer: torch.optim.Optimizer, name: str, **options: Any) -> Any:
    """One of timm's schedules; None for 'none'.

    Raises:
        ValueError: If this timm knows none of that name.
        MissingPackageError: If a newer timm does.
    """
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(optimizer, name, **options)
    if scheduler is None and name == 'constant':  # timm < 1.0.31
        scheduler, _ = create_scheduler_v2(optimizer, 'step', **{**options, 'decay_epochs': 1, 'decay_rate': 1.0})
    if scheduler is None and name in ('rsqrt', 'wsd'):
        raise MissingPackageError(
            f"timm {timm.__version__} has no schedule {name!r}. Do: pip install 'timm>=1.0.31', or take another, such "
            "as 'cosine'."
        )
    if scheduler is None and name != 'none':
        raise ValueError(f'Unknown scheduler {name!r}.')
    return scheduler


def forget_compiled() -> None:
    """Has compiled code look anew at modules whose classes changed, which until torch 2.4 it does not by itself."""
    if 'torch._dynamo' in sys.modules and _TORCH < (2, 5):
        torch.compiler.reset()


# Whether this torch tells which hooks for saved tensors are in force, and which were when a tensor was saved.
# torch 2.9 does not tell the latter.
TELLS_SAVED_TENSORS_HOOKS = hasattr(torch._C._autograd, '_top_saved_tensors_default_hooks') and hasattr(
    torch._C._autograd.SavedTensor, 'unpack_hook'
)


def saved_tensors_hooks_in_force() -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None:
    """The innermost pair of `torch.autograd.graph.saved_tensors_hooks` that is in force, if any is."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks or None


def may_hook_saved_tensors() -> bool:
    """Whether `torch.autograd.graph.disable_saved_tensors_hooks` is not in force."""
    autograd: Any = torch._C._autograd
    return bool(autograd._saved_tensors_hooks_is_enabled())


def logit_distillation_task() -> Callable[..., Any]:
    """`timm.task.LogitDistillationTask`.

    Raises:
        MissingPackageError: If this timm has none.
    """
    try:
        from timm.task import LogitDistillationTask
    except ImportError as error:  # timm < 1.0.23
        raise MissingPackageError(
            f"stage 'distill' is timm's own distillation task, which timm {timm.__version__} has not. "
            "Do: pip install 'timm>=1.0.23', or leave it out: stages=('initialize', 'match')."
        ) from error
    task: Callable[..., Any] = LogitDistillationTask
    return task
