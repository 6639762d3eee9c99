"""Explanations: what was read, what became of each sum and softmax, who decided, and on which line."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import Explanation, ModelError, NoMatchError, OptionError
from tests.swap import small_attention

PACKAGE = Path(sem_timm.__file__).parent


@cache
def model_of(name: str, **options: Any) -> nn.Module:
    with torch.device('meta'):
        return timm.create_model(name, **options)


def explained(name: str, module: str, operation: str = 'sem', **options: Any) -> Explanation:
    """The explanation of a module of timm, which agrees with what the plan says of it."""
    found = sem_timm.explain(model_of(name), module, operation, **options)
    try:
        plan = sem_timm.plan_model(model_of(name), operation, target=[module], **options)
    except sem_timm.RefusedError as error:
        assert found.refusal is not None and f'{module}: {found.refusal.text}' in str(error)
    else:
        assert found.refusal is None and list(found.sites) == list(plan.sites)
        assert found.code == plan.code(found.sites[0].name)
    assert json.loads(json.dumps(found.to_dict()))['name'] == module
    return found


def source_of(module: str, line: str) -> str:
    """The text of a line of a module of Python, named as in explanations: 'timm/models/cait.py:64: code'."""
    place, _, code = line.partition(': ')
    file, _, number = place.rpartition(':')
    assert file == module, line
    imported = inspect.getsource(__import__(module[:-3].replace('/', '.'), fromlist=['']))
    assert imported.splitlines()[int(number) - 1].strip() == code
    return code


# Model, module, operation, reason, the file that decided, and a part of the line of timm's that is concerned.
REFUSED = [
    ('cait_xxs24_224', 'blocks_token_only.0.attn', 'external', 'a single query', 'swap/queries.py', 'cait', 'dot_pr'),
    ('cait_xxs24_224', 'blocks.0.attn', 'external', 'its logits are mixed', 'swap/cores.py', 'cait', 'softmax'),
    ('convit_tiny', 'blocks.0.attn', 'external', 'attention weights are mixed', 'swap/cores.py', 'convit', 'softmax'),
    ('davit_tiny', 'stages.1.blocks.0.1.attn', 'external', 'attends over channels', 'swap/queries.py', 'davit', '@ q.'),
    ('levit_128s', 'stages.0.blocks.0', 'external', 'stages.0.blocks.0.attn may have one', 'swap/place.py', '', ''),
    ('resnet50', 'fc', 'sem', 'no positions to pool over', 'insert.py', '', ''),
]


@pytest.mark.parametrize(('model', 'module', 'operation', 'reason', 'file', 'of', 'code'), REFUSED)
def test_refusal_names_its_reason_the_line_and_who_decided(
    model: str, module: str, operation: str, reason: str, file: str, of: str, code: str
) -> None:
    found = explained(model, module, operation)
    assert found.refusal is not None and reason in found.refusal.text
    assert found.refusal.decided_by == f'surgery/{file}' and (PACKAGE / found.refusal.decided_by).is_file()
    assert bool(found.refusal.line) == bool(of)
    assert not of or code in source_of(f'timm/models/{of}.py', found.refusal.line)
    for part in (found.refusal.text, found.refusal.line, found.refusal.decided_by, found.class_name, found.forward):
        assert part in str(found)


def test_forward_that_no_level_traces_is_explained_by_its_line() -> None:
    found = explained('densenet121', 'features.denseblock1.denselayer1', position='residual')
    assert found.refusal is not None and 'uses checkpoint, which a graph cannot show' in found.refusal.text
    assert found.refusal.decided_by == 'surgery/trace.py'
    assert not found.lines and 'could not be read' in found.traced


def test_fused_inputs_of_dla_are_a_sum_that_is_no_residual_add() -> None:
    found = explained('dla102', 'level3.tree1.tree1.root', position='residual')
    (finding,) = found.findings
    assert not finding.accepted and finding.text == 'it fuses tensors of a list that the module is given'
    assert finding.code == 'cat = cat + x_children_0' and finding.place.startswith('timm/models/dla.py:')
    assert found.refusal is not None and found.refusal.decided_by == 'surgery/insert.py'
    assert explained('dla102', 'level3.tree1.tree1.root').sites[0].position == 'output'


def test_site_shows_the_forward_with_shapes_and_layouts_and_the_new_code() -> None:
    found = explained('resnet18', 'layer2.0')
    assert found.num_calls == 1 and found.is_candidate and found.traced == 'traced plainly'
    assert found.forward.startswith('timm/models/resnet.py:')
    first, *_, last = found.lines
    assert (first.code, first.value) == ('x', '(B, 64, 56, 56) NCHW')
    assert (last.code, last.value) == ('return out', '(B, 128, 28, 28) NCHW')
    (finding,) = found.findings
    assert finding.accepted and finding.text == 'a residual add: the branch out to the shortcut x'
    assert 'channels 128' in str(found) and 'self.sem(out, x)' in str(found)


def test_partial_residual_of_rexnet_is_a_slice_of_the_branch() -> None:
    (finding,) = explained('rexnet_100', 'features.4').findings
    assert finding.accepted and 'a slice of the branch' in finding.text


def test_of_two_branches_the_first_is_left_to_all() -> None:
    first, last = explained('test_vit', 'blocks.0').findings
    assert first.accepted and "branches='last'" in first.text
    assert last.accepted and "branches='last'" not in last.text


def test_core_is_told_with_its_scale_extras_heads_and_mask() -> None:
    found = explained('levit_128s', 'stages.0.blocks.0.attn', 'catt')
    (finding,) = found.findings
    assert finding.accepted and found.traced.endswith('kept as single calls (get_attention_biases)')
    for part in ('queries', 'keys', 'values', 'times 0.25', '(added)', '4 heads on axis -3', 'no mask is handed on'):
        assert part in finding.text
    masked = explained('test_vit', 'blocks.0.attn', 'catt').findings[0].text
    assert 'attn_mask is handed on as its mask' in masked


def test_levels_of_tracing_and_followed_methods_are_told() -> None:
    assert explained('convit_tiny', 'blocks.0.attn', 'external').traced == (
        'traced guided by values, its own methods followed'
    )


def test_prefix_tokens_and_split_channels_are_told() -> None:
    values = [line.value for line in explained('test_vit', 'blocks.0.attn', 'external').lines]
    assert values[0] == '(B, 101, 64) NLC, 1 prefix token'
    assert '(B, 2, 101, 32) channels split or gone' in values and 'None' in values


class Network(nn.Module):
    """Attention of torch's own, a layer that is called twice, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.twice = nn.Linear(32, 32)
        self.never = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.twice(self.twice(x))


@pytest.mark.parametrize(
    ('module', 'operation', 'reason', 'file', 'calls'),
    [
        ('attention', 'external', 'call it with need_weights=False', 'surgery/equivalents/attention.py', 1),
        ('twice', 'sem', 'calls it 2 times', 'surgery/placement.py', 2),
        ('never', 'sem', 'does not call it', 'surgery/placement.py', 0),
    ],
)
def test_modules_that_cannot_be_read_are_explained(
    module: str, operation: str, reason: str, file: str, calls: int
) -> None:
    found = sem_timm.explain(Network(), module, operation, input_size=(3, 32, 32))
    assert found.refusal is not None and reason in found.refusal.text
    assert (found.refusal.decided_by, found.num_calls) == (file, calls)


def test_patched_module_is_explained_with_the_forward_that_it_had() -> None:
    model = sem_timm.patch_model(timm.create_model('test_resnet'))
    name = sem_timm.patched_modules(model)[0].name
    found = sem_timm.explain(model, name)
    assert found.refusal is not None and 'already patched (sem)' in found.refusal.text
    assert found.forward.startswith('timm/models/resnet.py:')


def test_model_that_does_not_run_is_a_reason_and_not_a_crash() -> None:
    class Broken(Network):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError('not today')

    found = sem_timm.explain(Broken(), 'stem')
    assert found.refusal is not None and 'not today' in found.refusal.text
    assert found.refusal.decided_by == 'meta/probing.py' and "raise ValueError('not today')" in found.refusal.line
    assert 'does not run' in str(found)


def test_line_of_a_module_of_ones_own_is_told_too() -> None:
    model = small_attention.Model(small_attention.MixedLogits())
    found = sem_timm.explain(model, 'attention', 'external', input_size=(3, 32, 32))
    assert found.refusal is not None and found.refusal.decided_by == 'surgery/swap/cores.py'
    assert small_attention.__file__ in found.refusal.line


def test_wrong_arguments_say_what_there_is() -> None:
    model = model_of('resnet18')
    with pytest.raises(NoMatchError, match=r"'layer3\.9' is no module of ResNet\. Close: layer3"):
        sem_timm.explain(model, 'layer3.9')
    with pytest.raises(NoMatchError, match='is no module of ResNet'):
        sem_timm.explain(model, '')
    with pytest.raises(OptionError, match="operation 'semm' is unknown"):
        sem_timm.explain(model, 'layer1.0', 'semm')
    with pytest.raises(OptionError, match='does not accept input_size'):
        sem_timm.explain(model, 'layer1.0', input_size=(7, 32, 32))
    with pytest.raises(ModelError, match=r'model\.module'):
        sem_timm.explain(nn.DataParallel(nn.Sequential(nn.Linear(3, 3))), 'module')
