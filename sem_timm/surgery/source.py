"""Python source of a forward: from edited graphs, or around the forward that a module has."""

from __future__ import annotations

import ast
import builtins
import inspect
import keyword
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from math import isfinite
from types import FunctionType
from typing import Any, TypeGuard

from torch import Tensor, fx

from sem_timm.errors import GuardError
from sem_timm.surgery.decisions import FITS, answers, check, divide, equals
from sem_timm.surgery.trace import Trace


def graph_source(
    trace: Trace, graphs: dict[bool, fx.Graph], other_case: Callable[..., Any]
) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Source and bindings of a forward made from edited graphs, one for each mode where they differ.

    What a call has to satisfy for the graphs to hold is asked first, in a function of its own; others are handed on.
    """
    taken = {name for name in trace.signature.parameters if name not in trace.values}  # those of *args and **kwargs
    evaluation = divide(graphs[False])
    training = evaluation if graphs[True] is graphs[False] else divide(graphs[True])
    asked, more = _in_modes(training[0], evaluation[0], partial(_questions, taken=taken))
    code, bindings = _in_modes(training[1], evaluation[1], partial(_body, taken=taken))
    checked = any(node.target is check for graph in (training[1], evaluation[1]) for node in graph.nodes)
    if not asked and not trace.guards and not checked:
        return _function(trace.signature, code), tuple(sorted(bindings.items()))
    guards = [f'if not ({guard.condition}):\n    return False' for guard in trace.guards]
    more |= {'equals': equals} if any(guard.condition.startswith('equals(') for guard in trace.guards) else {}
    bindings = {**bindings, **more, other_case.__name__: other_case}
    arguments = ', '.join(['self', *_passed_on(trace.signature)])
    code = [f'if not {FITS}({arguments}):\n    return {other_case.__name__}({arguments})', *code]
    fits = _function(trace.signature.replace(return_annotation=bool), [*guards, *(asked or ['return True'])], FITS)
    return f'{fits}\n\n{_function(trace.signature, code)}', tuple(sorted(bindings.items()))


def _in_modes(
    training: fx.Graph, evaluation: fx.Graph, write: Callable[[fx.Graph], tuple[str, dict[str, Any]]]
) -> tuple[list[str], dict[str, Any]]:
    """The code of the graphs of both modes, and the globals that it needs."""
    code, bindings = write(evaluation)
    other, more = (code, bindings) if training is evaluation else write(training)
    if other == code:
        return [code] if code else [], bindings
    # Each ends with a return: a forward that of its result, questions that of True.
    return ['if self.training:', textwrap.indent(other, '    '), code], {**more, **bindings}


def output_source(
    base: type, signature: inspect.Signature, name: str, kind: type
) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Source and bindings of a forward that calls the old one and passes its output, or its first, to a new child."""
    taken = {'self', 'out', 'GuardError', 'Tensor', *signature.parameters}
    own = base.__name__.isidentifier() and not keyword.iskeyword(base.__name__) and base.__name__ not in taken
    cls = base.__name__ if own else 'BaseClass'
    call = f'{cls}.forward({", ".join(["self", *_passed_on(signature)])})'
    if kind not in (tuple, list) and len(signature.parameters) == 1:
        return _function(signature, [f'return self.{name}({call})']), ((cls, base),)
    # With other arguments it may return one tensor instead of several, or several instead of one.
    message = f'{base.__name__} was patched when it returned a {kind.__name__}; now it returns no tensor.'
    lines = [
        f'out = {call}',
        'if isinstance(out, Tensor):',
        f'    return self.{name}(out)',
        'if type(out) not in (tuple, list) or not out or not isinstance(out[0], Tensor):',
        f'    raise GuardError({message!r})',
        f'return type(out)([self.{name}(out[0]), *out[1:]])',
    ]
    return _function(signature, lines), ((cls, base), ('GuardError', GuardError), ('Tensor', Tensor))


def _function(signature: inspect.Signature, lines: list[str], name: str = 'forward') -> str:
    header = f'def {name}({", ".join(_header(signature))}){_returns(signature)}:'
    return header + '\n' + textwrap.indent('\n'.join(lines), '    ') + '\n'


def _header(signature: inspect.Signature) -> Iterator[str]:
    yield 'self'
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    keyword_only = False
    without_name = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            yield '*'
        keyword_only |= parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        text = stars.get(parameter.kind, '') + parameter.name
        text += _annotation(': ', parameter.annotation)
        if parameter.default is not inspect.Parameter.empty:
            plain = isinstance(parameter.default, (type(None), bool, int, str))
            plain |= isinstance(parameter.default, float) and isfinite(parameter.default)
            text += f' = {parameter.default!r}' if plain else ' = ...'  # the real default is set on the function
        yield text
        if without_name[-1:] == [parameter.name]:
            yield '/'


def _returns(signature: inspect.Signature) -> str:
    return _annotation(' -> ', signature.return_annotation)


def _annotation(sign: str, annotation: Any) -> str:
    """An annotation behind a sign; nothing for none, and for what cannot be written down, such as ``Unpack[...]``."""
    if annotation is inspect.Parameter.empty:
        return ''
    # Text already, where the file postpones the evaluation of annotations.
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    try:
        ast.parse(text, mode='eval')
    except SyntaxError:
        return ''
    return sign + text


def _passed_on(signature: inspect.Signature) -> Iterator[str]:
    for parameter in signature.parameters.values():
        name = parameter.name
        forms: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: f'*{name}',
            inspect.Parameter.VAR_KEYWORD: f'**{name}',
            inspect.Parameter.KEYWORD_ONLY: f'{name}={name}',
        }
        yield forms.get(parameter.kind, name)


def _body(graph: fx.Graph, taken: set[str]) -> tuple[str, dict[str, Any]]:
    """The statements of a graph's code, and the globals they need."""
    written, globals_ = _written(graph, taken)
    return '\n'.join(text for _, text in written if text), globals_


def _questions(graph: fx.Graph, taken: set[str]) -> tuple[str, dict[str, Any]]:
    """The statements of a graph that ends in checks, each of which returns False where it fails."""
    if not any(node.target is check for node in graph.nodes):
        return '', {}
    written, globals_ = _written(graph, taken)
    lines = []
    for node, (_, text) in zip(graph.nodes, written):
        if node.target is check:
            value, expected, _ = (ast.unparse(argument) for argument in _call_in(text).args)
            asked = {'True': f'not {value}', 'False': value}.get(expected, f'not answers({value}, {expected})')
            text = f'if {asked}:\n    return False'
        lines += [text] if text and node.op != 'output' else []
    globals_ = {**{name: value for name, value in globals_.items() if value is not check}, 'answers': answers}
    return '\n'.join([*lines, 'return True']), globals_


def _call_in(text: str) -> ast.Call:
    """The call in a statement such as ``check2 = check(gt, False, 'line')``."""
    return next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))


def statements(graph: fx.Graph) -> list[tuple[str, str]]:
    """How the value of each node of a graph is called in its code, and the statement that makes it, if there is one."""
    return _written(graph, set())[0]


def _written(graph: fx.Graph, taken: set[str]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Name and statement of each node, none of them one that is taken, and the globals they need."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    graph, own = copy, _own_functions(copy)
    names = _human_names(graph, {*_RESERVED, *own.values(), *taken})
    for index, node in enumerate(graph.nodes):
        node.name = f'node{index}x'  # fx insists on names of its own, so these only mark the places
        if node.op == 'placeholder':  # kwargs['mask'] can be read, and is no name of an argument
            node.target = node.name
    code = graph.python_code(root_module='self')
    function = next(node for node in ast.parse(code.src).body if isinstance(node, ast.FunctionDef))
    written = {name: own.get(value, name) for name, value in code.globals.items() if isinstance(value, FunctionType)}
    # What is used once is read where it is used.
    attributes = {node.name for node in graph.nodes if node.op == 'get_attr' and len(node.users) == 1}
    read_at_use = {node.targets[0].id: ast.unparse(node.value) for node in function.body if _assigns(node, attributes)}
    renamed = {**written, **{node.name: name for node, name in names.items()}, **read_at_use}
    texts: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    made = next(reversed(texts))  # the output, by the last statement; one that makes nothing goes with the next
    # fx sets each variable to None after its last use; reusing names has the same effect and reads better.
    for statement in reversed([node for node in function.body if not _clears(node)]):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in texts:
            made = ast.unparse(statement.targets[0])
        statement = _Rename(renamed).visit(statement)
        texts[made] = [*([] if _assigns_to_itself(statement) else [ast.unparse(statement)]), *texts[made]]
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    globals_ = {written.get(name, name): value for name, value in code.globals.items()}
    by_node = [(renamed.get(name, ''), '\n'.join(lines)) for name, lines in texts.items()]
    return by_node, {name: value for name, value in globals_.items() if name in used}


def _own_functions(graph: fx.Graph) -> dict[FunctionType, str]:
    """Functions of this package that a graph calls, by the short names that they are written with."""
    package = f'{__name__.split(".")[0]}.'
    targets = (node.target for node in graph.nodes if node.op == 'call_function')
    return {t: t.__name__ for t in targets if isinstance(t, FunctionType) and t.__module__.startswith(package)}


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Writes ``x[slice(None, 64, None)]`` as ``x[:64]``."""
        self.generic_visit(node)
        if isinstance(node.slice, ast.Tuple):
            node.slice.elts = [_as_slice(entry) for entry in node.slice.elts]
        else:
            node.slice = _as_slice(node.slice)
        return node


def _as_slice(index: ast.expr) -> ast.expr:
    if not (isinstance(index, ast.Call) and isinstance(index.func, ast.Name) and index.func.id == 'slice'):
        return index
    return ast.Slice(*(None if isinstance(part, ast.Constant) and part.value is None else part for part in index.args))


def _assigns(node: ast.stmt, names: set[str]) -> TypeGuard[Any]:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names and not _clears(node)


def _clears(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is None


def _assigns_to_itself(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(node.value)


def _human_names(graph: fx.Graph, reserved: set[str]) -> dict[fx.Node, str]:
    """Lets a value take over the name of the operand that dies with it, as in ``x = self.norm(x)``."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    last_use = {source: order[node] for node in graph.nodes for source in node.all_input_nodes}
    names = {node: str(node.target) for node in graph.nodes if node.op == 'placeholder'}
    busy_until = {name: len(order) for name in ('self', *names.values(), *reserved)}
    for node, index in order.items():
        if node.op in ('placeholder', 'output'):
            continue
        # What is read at its use has no name to hand on.
        sources = [source for source in node.all_input_nodes if source.op != 'get_attr' or len(source.users) > 1]
        if sources and last_use[sources[0]] == index and not _reads(node) and names[sources[0]].isidentifier():
            names[node] = names[sources[0]]
        else:
            stem = _stem(node, names)
            names[node] = next(name for name in _numbered(stem) if busy_until.get(name, -1) <= index)
        if busy_until.get(names[node]) != len(order):  # a parameter's name stays its own to the end
            busy_until[names[node]] = last_use.get(node, index)
    return names


def _reads(node: fx.Node) -> bool:
    """Whether a node only looks something up, such as a parameter or a size."""
    looks_up = node.op == 'call_function' and node.target in (getattr, operator.getitem)
    return node.op == 'get_attr' or (looks_up and isinstance(node.args[1], (str, int)))


def _stem(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == 'get_attr':
        return str(node.target).replace('.', '_')
    if node.op == 'call_function' and node.target is getattr:
        return str(node.args[1])
    if _reads(node) and isinstance(node.args[0], fx.Node):
        return f'{re.sub("[^0-9a-zA-Z]+", "_", names[node.args[0]]).strip("_")}_{node.args[1]}'
    name = getattr(node.target, '__name__', str(node.target)).strip('_')
    return name if node.op != 'call_module' and name.isidentifier() else 'out'


def _numbered(stem: str) -> Iterator[str]:
    stem = stem.replace('-', 'minus_')  # of an index from the end
    stem = stem if stem.isidentifier() else 'value'
    yield stem
    yield from (f'{stem}{number}' for number in count(2))


_OURS = {'check', 'answers', 'equals', 'other_case', 'GuardError', FITS}
_RESERVED = {'torch', 'device', 'inf', 'nan', 'math', 'operator', *_OURS, *dir(builtins)}
