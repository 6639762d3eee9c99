"""`plan_model` and `patch_model`: an operation, by name or configuration, planned in a model and applied to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

from torch import nn

from sem_timm.errors import OptionError, closest
from sem_timm.layers import TIMM_PREFIX, AttentionCore, attention_names, excitation_names, timm_attention_names
from sem_timm.operations.attention import AttentionConfig
from sem_timm.operations.configs import (
    ExcitationConfig,
    ExternalAttention2dConfig,
    InsertConfig,
    InsertionConfig,
    ScaleAndShiftConfig,
    SEMConfig,
    TimmAttentionConfig,
)
from sem_timm.operations.scales import match_scales
from sem_timm.surgery import Plan, Target, apply_plan, plan_insertion, plan_swap

Operation = str | InsertionConfig | AttentionConfig | Callable[..., nn.Module]


def operation_names() -> tuple[str, ...]:
    """The short names that `plan_model` and `patch_model` understand."""
    of_timm = (TIMM_PREFIX + name for name in timm_attention_names())
    return ('sem', *excitation_names(), *attention_names(), 'ssf', 'external2d', *of_timm)


def resolve_operation(operation: Operation, **options: Any) -> InsertionConfig | AttentionConfig:
    """Makes a configuration of an operation's short name, class or configuration, and options.

    Raises:
        OptionError: If the operation or an option is unknown, or an option is out of range.
    """
    if isinstance(operation, (InsertionConfig, AttentionConfig)):
        if options:
            raise OptionError(
                f'options {", ".join(options)} were given beside a configuration; put them into it: '
                f'{type(operation).__name__}({next(iter(options))}=...).'
            )
        return operation
    if operation in attention_names() or (isinstance(operation, type) and issubclass(operation, AttentionCore)):
        if 'attention' in options:
            raise OptionError(f"option 'attention' of attention {operation!r} is unknown; the operation says which.")
        attention: Any = operation
        return AttentionConfig(attention, **options)
    if operation is AttentionConfig:
        return AttentionConfig(**options)
    fixed: dict[str, Any] = {}
    if isinstance(operation, type) and issubclass(operation, InsertionConfig):
        cls: type[InsertionConfig] = operation
    elif isinstance(operation, str):
        cls, fixed = _by_name(operation)
    elif callable(operation):
        cls, fixed = InsertConfig, {'factory': operation}
    elif isinstance(operation, Plan):
        raise OptionError('this is a plan already; patch_model(model, plan) applies it.')
    else:
        raise OptionError(f'operation={operation!r} is neither a name, a configuration nor a module class.')
    known = [f.name for f in fields(cls) if f.name not in fixed]
    for name in options:
        if name not in known:
            raise OptionError(f'option {name!r} of operation {operation!r} is unknown. {closest(name, known)}')
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.name not in {*fixed, *options}]
    if needed:
        raise OptionError(f'{cls.__name__} needs {", ".join(needed)}: {cls.__name__}({needed[0]}=...).')
    return cls(**fixed, **options)


def _by_name(name: str) -> tuple[type[InsertionConfig], dict[str, Any]]:
    if name == 'sem':
        return SEMConfig, {}
    if name == 'ssf':
        return ScaleAndShiftConfig, {}
    if name == 'external2d':
        return ExternalAttention2dConfig, {}
    if name in excitation_names():
        return ExcitationConfig, {'excitation': name}
    if name.startswith(TIMM_PREFIX) and name.removeprefix(TIMM_PREFIX) in timm_attention_names():
        return TimmAttentionConfig, {'name': name.removeprefix(TIMM_PREFIX)}
    if name in timm_attention_names():
        raise OptionError(
            f"operation {name!r} is unknown. timm's own attention of that name is asked for as "
            f'{TIMM_PREFIX + name!r}; it changes the outputs.'
        )
    raise OptionError(f'operation {name!r} is unknown. {closest(name, operation_names())}')


def plan_model(
    model: nn.Module,
    operation: Operation = 'sem',
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> Plan:
    """Plans an operation on a model without touching it: no weight is read, no random number drawn.

    Args:
        model: Any model with blocks or self-attention; timm's know their input size.
        operation: What is inserted into blocks: 'sem', an excitation operator by itself such as 'se', 'ssf',
            'external2d', an attention of timm's such as 'timm_cbam', or a module class ``(channels) -> nn.Module``. Or
            what takes the place of self-attention: 'external', 'eamlp', 'efficient', 'linear', 'halo', 'monarch',
            'catt', 'caam', or a subclass of ``AttentionCore``. Or a configuration of either.
        target: Which blocks or attention modules: a regular expression that matches whole names, a list of names or
            dotted suffixes, a module class, or a callable ``(name, module) -> bool``. By default all.
        exclude: Which not, by the same rules.
        input_size: Shape (C, H, W) of one input image, where the model does not say.
        **options: Fields of the operation's configuration. Of all that are inserted, ``position``: 'residual' puts them
            on the residual branch, right before the add, 'output' on what the block returns, 'auto' on the branch of a
            block that has one, else on the output; and ``branches``, 'last' or 'all'.

    Returns:
        The plan; printing it shows a table.

    Raises:
        SemTimmError: NoMatchError, RefusedError, OptionError or ModelError, each saying what to do.
    """
    config = resolve_operation(operation, **options)
    plan: Callable[..., Plan] = plan_swap if isinstance(config, AttentionConfig) else plan_insertion
    return plan(model, config, target=target, exclude=exclude, input_size=input_size)


def patch_model(
    model: nn.Module,
    operation: Operation | Plan = 'sem',
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> nn.Module:
    """Operates on a model in place, all of it or nothing; `unpatch_model` gives the model back as it was.

    Args:
        model: The model.
        operation: A plan from `plan_model`, or what `plan_model` takes; then the other arguments are its too.
        target: See `plan_model`.
        exclude: See `plan_model`.
        input_size: See `plan_model`.
        **options: See `plan_model`.

    Returns:
        The same model. New modules have the device and mode of their block, the type of the tensor they are applied to,
        and initial values from torch's random generator.

    Warns:
        SwapWarning: If self-attention was replaced: the outputs are others than before. It says whether the model
            needs training.

    Raises:
        SemTimmError: As `plan_model`, and PlanError if a plan does not fit the model. The model is then unchanged.
    """
    if isinstance(operation, Plan):
        extra = {'target': target, 'exclude': exclude, 'input_size': input_size, **options}
        given = [name for name, value in extra.items() if value is not None]
        if given:
            raise OptionError(
                f'{", ".join(given)} given beside a plan, which has them already; give them to plan_model.'
            )
        plan = operation
    else:
        plan = plan_model(model, operation, target=target, exclude=exclude, input_size=input_size, **options)
    return apply_plan(model, plan, partial(match_scales, model, plan))
