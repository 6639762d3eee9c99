"""Why one module takes an operation, or why not: what was read of its forward, what was found there, who decided."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from sem_timm.errors import ModelError, NoMatchError, TraceError, closest, from_package
from sem_timm.operations import AttentionConfig
from sem_timm.operations.calls import Operation, resolve_operation
from sem_timm.reports.findings import Finding, findings_of_softmaxes, findings_of_sums
from sem_timm.reports.listing import Line, Listing
from sem_timm.reports.reason import Reason, reason_of
from sem_timm.surgery import (
    AttentionSite,
    Inserter,
    Placement,
    Reader,
    Reading,
    Refused,
    Site,
    Swapper,
    Verdict,
    check_model,
    edit_of,
    judged_softmaxes,
    own_methods,
    own_methods_called,
    reading_of,
)
from sem_timm.tables import table

# A line of code is shown up to here.
_WIDTH = 72


@dataclass(frozen=True, repr=False)
class Explanation:
    """Why one module takes an operation, or why not; prints as a text.

    Attributes:
        operation: The operation.
        model_name: Class of the model.
        input_size: Shape (C, H, W) of the probe; empty where the model could not be run.
        name: Name of the module in the model.
        class_name: Its class.
        forward: File and lines of its own forward, as 'timm/models/resnet.py:100-120'; empty where it has no file.
        num_calls: How often the model's forward called it.
        is_candidate: Whether a plan of the whole model looks at it.
        traced: How its forward was read, in words, or why it could not be.
        guards: What a call has to satisfy for that to hold.
        lines: The forward as it was traced, with what each line gives.
        looked_at: 'sums' or 'softmaxes'.
        findings: What became of each of them.
        sites: The sites; none where it is refused.
        code: The rewritten forward.
        refusal: Why it is refused; None for a site.
    """

    operation: str
    model_name: str
    name: str
    class_name: str
    forward: str
    input_size: tuple[int, ...] = ()
    num_calls: int = 0
    is_candidate: bool = False
    traced: str = 'it could not be read'
    guards: tuple[str, ...] = ()
    lines: tuple[Line, ...] = field(default=(), repr=False)
    looked_at: str = 'sums'
    findings: tuple[Finding, ...] = ()
    sites: tuple[Site | AttentionSite, ...] = ()
    code: str = ''
    refusal: Reason | None = None

    def to_dict(self) -> dict[str, Any]:
        """The explanation as data that `json.dumps` takes."""
        data = {**vars(self), 'input_size': list(self.input_size), 'guards': list(self.guards)}
        data |= {key: [asdict(entry) for entry in data[key]] for key in ('lines', 'findings')}
        data['sites'] = [site.to_dict() for site in self.sites]
        return {**data, 'refusal': None if self.refusal is None else asdict(self.refusal)}

    def __repr__(self) -> str:
        size = f' at {" x ".join(map(str, self.input_size))}' if self.input_size else ''
        times = {0: 'not called', 1: 'called once'}.get(self.num_calls, f'called {self.num_calls} times')
        times = times if size else 'of a model that does not run'
        noun = Inserter.noun if self.looked_at == 'sums' else Swapper.noun
        text = [
            f'{self.operation} in {self.name} ({self.class_name}) of {self.model_name}{size}',
            f'Forward: {self.forward or "of no file"}, {times}; {self.traced}.',
            f'It is {"one" if self.is_candidate else "none"} of the {noun} that a plan of the whole model looks at.',
            *(f'Holds for calls with {guard}.' for guard in self.guards),
            *self._listed(),
            *self._found(),
        ]
        return '\n'.join([*text, '', *(self._accepted() if self.refusal is None else self._refused(self.refusal))])

    def _listed(self) -> list[str]:
        if not self.lines:
            return []
        rows = [(self._number(line.place), _cut(line.code), line.value) for line in self.lines]
        return ['', *table(('line', 'code', 'gives'), rows, left=3)]

    def _number(self, place: str) -> str:
        """The number of a line of the forward's own file; of another, its file as well."""
        return place.removeprefix(self.forward.rpartition(':')[0] + ':')

    def _found(self) -> list[str]:
        if not self.lines:
            return []
        lines = ['', f'{self.looked_at.capitalize()} that were looked at:' if self.findings else '']
        for finding in self.findings:
            lines += [f'  {self._number(finding.place)}: {_cut(finding.code)}', f'    {_verdict(finding)}']
        return lines if self.findings else ['', f'There are no {self.looked_at} in it.']

    def _accepted(self) -> list[str]:
        lines = []
        for site in self.sites:
            facts = [f'{name} {value}' for name, value in zip(site.columns[2:], site.row()[2:])]
            lines.append(f'It is a site, {site.name}.{site.attribute}: {", ".join(facts)}.')
        return [*lines, '', self.code.rstrip()]

    def _refused(self, refusal: Reason) -> list[str]:
        line = [f'  concerns: {refusal.line}'] if refusal.line else []
        return [f'Refused: {refusal.text}', *line, f'  decided by: {refusal.decided_by}']


def _verdict(finding: Finding) -> str:
    return finding.text if finding.accepted else f'no: {finding.text}'


def _cut(code: str) -> str:
    return code if len(code) <= _WIDTH else code[: _WIDTH - 1] + '…'


def explain(
    model: nn.Module,
    name: str,
    operation: Operation = 'sem',
    *,
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> Explanation:
    """Explains why one module takes an operation, or why not; the model is not touched.

    Args:
        model: The model.
        name: Name of the module in it, as in ``named_modules``.
        operation: What `plan_model` takes.
        input_size: Shape (C, H, W) of one input image, where the model does not say.
        **options: Fields of the operation's configuration.

    Returns:
        The explanation; printing it shows the module's forward as it was read, and what was found in it.

    Raises:
        NoMatchError: If the model has no such module.
        ModelError: If the model is wrapped.
        OptionError: If the operation or an option is unknown, or the model does not accept ``input_size``.
    """
    check_model(model)
    config = resolve_operation(operation, **options)
    modules = {key: module for key, module in model.named_modules() if key}
    if name not in modules:
        raise NoMatchError(f'{name!r} is no module of {type(model).__name__}. {closest(str(name), modules)}')
    cls = type(modules[name])
    told = Explanation(str(config), type(model).__name__, name, cls.__name__, _place_of_forward(modules[name]))
    try:
        with reading_of(model, input_size) as reader:
            return _explained(told, reader, config)
    except ModelError as error:  # the model could not be run, so no shape in it is known
        return replace(told, refusal=reason_of(error))


def _explained(told: Explanation, reader: Reader, config: Any) -> Explanation:
    swaps = isinstance(config, AttentionConfig)
    placer: Any = Swapper(reader, config) if swaps else Inserter(reader, config)
    placement, error = _placed(placer, told.name)
    reading, unread = _reading(reader, placer, told.name)
    told = replace(
        told,
        input_size=reader.probe.input_size,
        num_calls=reader.probe.counts.get(told.name, 0),
        is_candidate=told.name in placer.candidates,
        looked_at='softmaxes' if swaps else 'sums',
        traced=unread,
    )
    verdicts: list[Verdict[Any]] = []
    if reading is not None:
        module = reader.modules[told.name]
        verdicts = _verdicts(placer, told.name, reading, module) if swaps else []
        told = _with_listing(told, reading, module, verdicts, placer)
    if placement is not None:
        error = _rehearsed(placer, placement)  # last, for it may use the weightless copy up
    if placement is None or error is not None:
        assert error is not None
        return replace(told, refusal=reason_of(error, verdicts))
    return replace(told, sites=placement.sites, code=placement.edit.source)


def _with_listing(
    told: Explanation, reading: Reading, module: nn.Module, verdicts: list[Verdict[Any]], placer: Any
) -> Explanation:
    """An explanation with a reading written out, and what became of its sums or softmaxes."""
    try:
        listing = Listing(reading, _batch_size(placer.reader))
    except SyntaxError as error:  # a child named by a keyword, say
        return replace(told, traced=f'{_how(reading, module)}, but it cannot be written as code: {error}')
    if isinstance(placer, Swapper):
        findings = findings_of_softmaxes(verdicts, placer, module, listing)
    else:
        findings = findings_of_sums(reading, module, listing)
    guards = tuple(guard.condition for guard in reading.trace.guards)
    return replace(told, traced=_how(reading, module), guards=guards, lines=listing.lines, findings=findings)


def _placed(placer: Any, name: str) -> tuple[Placement | None, Exception | None]:
    try:
        placement = placer.place(name)
        placer.prove(placement.sites[0].name, placement)
    except (Refused, TraceError) as error:
        return None, error
    return placement, None


def _rehearsed(placer: Any, placement: Placement) -> Exception | None:
    try:
        placer.rehearse({placement.sites[0].name: placement})
    except TraceError as error:
        return error
    return None


def _reading(reader: Reader, placer: Any, name: str) -> tuple[Reading | None, str]:
    """The reading of a module that a placer has looked at last, or why there is none."""
    if name not in reader.probe.calls:
        return None, 'without a call there is nothing to read'
    judged = getattr(placer, 'judged', {}).get(name, ())
    for reading, verdicts in reversed(judged):
        if verdicts or len(judged) == 1:
            return reading, ''
    try:
        return reader.read(name), ''
    except TraceError as error:
        return None, f'it could not be read: {error}'.rstrip('.')


def _verdicts(placer: Swapper, name: str, reading: Reading, module: nn.Module) -> list[Verdict[Any]]:
    """What became of the softmaxes of a reading, as the placer has seen it."""
    for judged, verdicts in placer.judged.get(name, ()):
        if judged is reading:
            return list(verdicts)
    return list(judged_softmaxes(reading.trace.graphs[False], module, reading.values[False]))


def _how(reading: Reading, module: nn.Module) -> str:
    """How a forward was traced."""
    kept = sorted(own_methods_called(reading.trace.graphs[False], module))
    if kept:
        methods = f', its own methods kept as single calls ({", ".join(kept)})'
    else:
        followed = not reading.trace.methods and any(True for _ in own_methods(type(module)))
        methods = ', its own methods followed' if followed else ''
    return f'traced {reading.trace.level}{methods}'


def _batch_size(reader: Reader) -> int:
    call = reader.probe.calls['']
    return int(next(leaf.shape[0] for leaf in tree_leaves(call.args) if hasattr(leaf, 'shape')))


def _place_of_forward(module: nn.Module) -> str:
    """File and lines of the forward of a module's class, of what it was before it was patched."""
    edit = edit_of(module)
    cls: Any = type(module) if edit is None else edit.base
    forward = inspect.unwrap(cls.forward)
    try:
        lines, first = inspect.getsourcelines(forward)
        file = inspect.getsourcefile(forward)
    except (OSError, TypeError):  # it is of no file, or of no Python
        return ''
    return '' if file is None else f'{from_package(file)}:{first}-{first + len(lines) - 1}'
