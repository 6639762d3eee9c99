"""A swapped model and its original around the same weights: what learns, and what it learns from.

Neither is a second copy in memory. Both have the structure of the model, without hooks and in eval mode, around its own
tensors; the original has its old attention back. Only what is trained is there twice, until it is written back at the
end, so that a failure on the way leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from sem_timm.errors import ModelError, OptionError, RefusedError
from sem_timm.layers import ExternalAttention, WithValues
from sem_timm.meta import shadow, weightless
from sem_timm.surgery import (
    Edit,
    Original,
    Swap,
    check_model,
    check_not_compact,
    edit_of,
    plan_swap,
    put_back,
    trainable_parameters,
    unread_parameters,
)


@dataclass(frozen=True)
class SwappedLayer:
    """One swapped attention module.

    Attributes:
        name: Its name in the model.
        edit: What was done to it.
        student: The module as it is now, in the student.
        teacher: The module as it was, in the teacher.
        original: How the old attention is computed.
        masked: Which new children are handed the module's mask.
        num_prefix_tokens: Leading tokens, such as the class token, that are not image.
    """

    name: str
    edit: Edit
    student: nn.Module
    teacher: nn.Module
    original: Original
    masked: frozenset[str]
    num_prefix_tokens: int = 0

    def token_groups(self, output: Tensor) -> tuple[Tensor, ...]:
        """An output by kinds of tokens, (B, N, C) each: class and register tokens, which are few, and the image's."""
        count = self.num_prefix_tokens
        return (output[:, :count], output[:, count:]) if count else (output,)

    @property
    def cores(self) -> dict[str, ExternalAttention]:
        """The new cores that have memories, by their names in the module; none where a whole module was replaced."""
        if self.original.graph is None:
            return {}
        inner = {name: core.core if isinstance(core, WithValues) else core for name, core in self.inserted.items()}
        return {name: core for name, core in inner.items() if isinstance(core, ExternalAttention)}

    @property
    def with_values(self) -> dict[str, WithValues]:
        """The new cores that have maps of the values, by their names in the module."""
        return {name: core for name, core in self.inserted.items() if isinstance(core, WithValues)}

    @property
    def inserted(self) -> dict[str, nn.Module]:
        """The new children of the student by their names in the module."""
        return {name: getattr(self.student, name) for name in self.edit.inserted}

    def projections(self) -> set[str]:
        """Names, in the module, of the old children that the output of a core goes through."""
        graph = self.original.graph
        if graph is None:
            return set()
        after = {core.output for core in self.original.cores.values()}
        for node in graph.nodes:
            if after & set(node.all_input_nodes):
                after.add(node)
        return {str(node.target) for node in after if isinstance(node, fx.Node) and node.op == 'call_module'}


@dataclass(frozen=True)
class Pair:
    """A swapped model as it learns, and its original.

    Attributes:
        model: The swapped model, which stays as it is until `write_back`.
        student: Its twin, with parameters of its own where it is trained.
        teacher: Its twin with the old attention.
        layers: The swapped modules.
        trained: Names of the parameters that the student has for itself.
    """

    model: nn.Module
    student: nn.Module
    teacher: nn.Module
    layers: tuple[SwappedLayer, ...]
    trained: tuple[str, ...]

    def names(self, which: str) -> list[str]:
        """Names of the parameters that a word of `TRAINED` stands for, as far as they still reach the output.

        Raises:
            RefusedError: If there are none.
        """
        names = names_to_train(self.model, self.layers, which)
        if not names:
            raise RefusedError(
                f'{self.layers[0].edit.operation} has no parameters of its own, so that there is nothing new to train; '
                "train='projection' or train='module' trains weights of the base beside it."
            )
        return names

    def parameters(self, which: str) -> list[nn.Parameter]:
        """What the student trains, set to require gradients; all else in it does not."""
        names = set(self.names(which))
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in names)
        return [self.student.get_parameter(name) for name in names_in_order(self.student, names)]

    def groups(
        self, which: str, learning_rate: float, base_learning_rate: float
    ) -> list[tuple[list[nn.Parameter], float]]:
        """What the student trains, as `parameters` gives it: new ones at one rate, those of the base at another."""
        trained = self.parameters(which)
        new = {id(self.student.get_parameter(name)) for name in names_to_train(self.model, self.layers, 'new')}
        own, base = ([p for p in trained if (id(p) in new) == is_new] for is_new in (True, False))
        return [(own, learning_rate), (base, base_learning_rate)]

    @torch.no_grad()
    def learned(self, stage: str) -> dict[str, Tensor]:
        """A copy of what the student has learned up to the end of a stage, by names of parameters.

        Raises:
            ModelError: If something of it is infinite or not a number.
        """
        found = {name: self.student.get_parameter(name).detach().clone() for name in self.trained}
        for name, parameter in found.items():
            if not parameter.isfinite().all():
                raise ModelError(
                    f'in stage {stage!r} {name} became infinite or not a number; the model is as it was before this '
                    'stage. Use a smaller learning_rate, and look at the images.'
                )
        return found

    @torch.no_grad()
    def write(self, learned: dict[str, Tensor]) -> None:
        """Gives the model what the student had learned."""
        for name, parameter in learned.items():
            self.model.get_parameter(name).copy_(parameter)


def names_in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of parameters in the order of the model."""
    wanted = set(names)
    return [name for name, _ in model.named_parameters() if name in wanted]


def names_to_train(model: nn.Module, layers: Iterable[SwappedLayer], which: str) -> list[str]:
    """Names of the parameters that are trained; see `TransferOptions.train`."""
    if which == 'all':
        useful = {id(parameter) for parameter in trainable_parameters(model)}
        return [name for name, parameter in model.named_parameters() if id(parameter) in useful]
    prefixes: list[str] = []
    for layer in layers:
        children = [*layer.edit.inserted, *(layer.projections() if which == 'projection' else ())]
        prefixes += [f'{layer.name}.'] if which == 'module' else [f'{layer.name}.{child}.' for child in children]
    unread = unread_parameters(model)
    found = [name for name, p in model.named_parameters() if name.startswith(tuple(prefixes)) and p.is_floating_point()]
    return [name for name in found if name not in unread]


def make_pair(model: nn.Module, images: Tensor, trained: Iterable[str]) -> Pair:
    """A swapped model and its original, ready to learn; the model is not touched.

    Args:
        model: The swapped model.
        images: A batch of what the model is for, which tells the shape of its input.
        trained: Words of `TRAINED` for what will be trained, all at once.

    Raises:
        ModelError: If the model is wrapped, has no swapped attention, or lost its old weights.
        OptionError: If the model is in a narrower type than float32, in which training is not precise.
    """
    edits = swaps_of(model)
    teacher, student = shadow(model), shadow(model)
    _put_back(teacher)
    layers = _layers(model, edits, teacher, student, tuple(images.shape[1:]))
    names = {name for which in trained for name in names_to_train(model, layers, which)}
    own: dict[int, nn.Parameter] = {}
    for name in names:
        parameter = student.get_parameter(name)
        own[id(parameter)] = nn.Parameter(parameter.detach().clone())
    for module in student.modules():  # all of them: tied parameters stay tied
        for key, shared in module._parameters.items():
            if shared is not None and id(shared) in own:
                module._parameters[key] = own[id(shared)]
    return Pair(model, student, teacher, layers, tuple(names_in_order(student, names)))


def swaps_of(model: nn.Module) -> dict[str, Edit]:
    """The edits of a model's swapped modules by name; raises what `make_pair` raises."""
    check_model(model)
    edits = {name: edit for name, module in model.named_modules() if (edit := edit_of(module)) is not None}
    swaps = {name: edit for name, edit in edits.items() if edit.position == 'core' and edit.inserted}
    if not swaps:
        raise ModelError(
            f'no attention of this {type(model).__name__} was swapped, so that there is no original to learn from. '
            "Swap it first: patch_model(model, 'external')."
        )
    try:
        check_not_compact(model)
    except ModelError as error:
        raise ModelError(
            f'{str(error).split(";")[0]}, and with them the attention to learn from; '
            'transfer first, and drop_unread_parameters afterwards.'
        ) from error
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ModelError(f'this {type(model).__name__} is on the meta device and has no weights to learn from.')
    narrow = next((p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize < 4), None)
    if narrow is not None:
        raise OptionError(f'the model is in {narrow}, too coarse to train in; model.float() first, and cast it after.')
    return swaps


def _put_back(twin: nn.Module) -> None:
    """Gives a twin its old attention back; other patches stay."""
    for module in list(twin.modules()):
        while (edit := edit_of(module)) is not None and edit.position == 'core':
            put_back(module, edit)


def _layers(
    model: nn.Module, edits: dict[str, Edit], teacher: nn.Module, student: nn.Module, input_size: tuple[int, ...]
) -> tuple[SwappedLayer, ...]:
    """The swapped layers, each with the graph of its old attention, by planning its swap again."""
    found: dict[str, SwappedLayer] = {}
    for operation in dict.fromkeys(cast(Swap, edit.operation) for edit in edits.values()):
        names = {name for name, edit in edits.items() if edit.operation == operation}
        skeleton = weightless(model)
        _put_back(skeleton)
        plan = plan_swap(skeleton, operation, target=lambda name, _, names=names: name in names, input_size=input_size)
        for name in names:
            sites = [site for site in plan if site.name == name]
            masked = frozenset(site.attribute for site in sites if site.masked)
            modules = student.get_submodule(name), teacher.get_submodule(name)
            prefix = max(site.num_prefix_tokens for site in sites)
            if operation.replaces_module:  # of which the site does not tell; its tokens are (B, N, C)
                prefix = getattr(model, 'num_prefix_tokens', 0)
            found[name] = SwappedLayer(name, edits[name], *modules, plan.originals[name], masked, prefix)
    return tuple(found[name] for name in edits)
