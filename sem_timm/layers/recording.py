"""Who looks on while a forward runs: tracers, which write its operations down, and whatever was put around its layers.

What is faster on a CPU is often no plain call of a layer, or an operation that few programs know. It is for eager mode
and `torch.compile`; all others see the operations that any model is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import fx, nn

from sem_timm.compat import is_exporting
from sem_timm.errors import ModelError

Function = TypeVar('Function', bound=Callable[..., Any])


def is_recorded() -> bool:
    """Whether `torch.jit.trace` or `torch.export` writes operations down for programs that know common ones only."""
    if torch.compiler.is_compiling():
        # Until torch 2.10, torch.compile says that it exports as well.
        return is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing()


def may_write_over() -> bool:
    """Whether results may be written over: transforms such as `torch.func.vmap` cannot follow that."""
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def is_eager(*tensors: torch.Tensor) -> bool:
    """Whether plain tensors are computed with here and now, with gradients, and nobody writes the operations down."""
    return torch.is_grad_enabled() and not _is_followed() and all(type(tensor) is torch.Tensor for tensor in tensors)


def may_write_in_place(*tensors: torch.Tensor) -> bool:
    """Whether what is computed from tensors may be written over, or into memory at hand, with no difference but speed.

    That is so for tensors of torch's own types on a CPU in eager mode; any other type may be quantised, distributed or
    watched. Transforms and derivatives in forward mode cannot follow a result into ``out=``, and a trace by `torch.jit`
    has to be the same with gradients and without. For gradients, which need what would be written over, callers look
    themselves.
    """
    return not _is_followed() and all(type(x) in (torch.Tensor, nn.Parameter) and x.is_cpu for x in tensors)


def _is_followed() -> bool:
    """Whether a compiler, a trace, a transform or a derivative in forward mode follows how results are made."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    # The level of `forward_ad.dual_level`. To ask every tensor costs microseconds, which few tokens would notice.
    return torch.autograd.forward_ad._current_level >= 0


def one_node(function: Function) -> Function:
    """Makes a function of tensors one node in traces by `torch.fx`, which could not follow what it asks of shapes.

    As `torch.fx.wrap` does for the names of one file, and wherever the function is imported.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = _proxy_in(args)
        if proxy is not None:
            return proxy.tracer.create_proxy('call_function', call, args, kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


def traced_as_leaf(module: nn.Module, *args: Any) -> Any:
    """The call of a module as one node, if it is called in a trace by `torch.fx` of a model that it is part of.

    So tracers take torch's own layers. Modules of this package are walked into by default, and what depends on shapes
    cannot be followed.

    Returns:
        What stands for the result in the trace; None in any other call, and where the module itself is traced.
    """
    proxy = _proxy_in(args)
    if proxy is None or getattr(proxy.tracer, 'root', module) is module:
        return None
    tracer: Any = proxy.tracer
    return tracer.create_proxy('call_module', tracer.path_of_module(module), args, {})


def _proxy_in(args: tuple[Any, ...]) -> fx.Proxy | None:
    """The first argument that stands for a value in a trace by `torch.fx`."""
    for arg in args:  # not next(..., None), which torch.compile cannot follow in torch 2.4
        if isinstance(arg, fx.Proxy):
            return arg
    return None


def refuse_script(module: nn.Module) -> NoReturn:
    """What `torch.jit.script` calls first, as ``__prepare_scriptable__``, on a module and all in it.

    Raises:
        ModelError: Always; without it the compiler complains of some line of Python.
    """
    raise ModelError(
        f'torch.jit.script cannot compile {type(module).__name__}, nor a model that holds one. '
        'Trace it: torch.jit.trace(model.eval(), images).'
    )
