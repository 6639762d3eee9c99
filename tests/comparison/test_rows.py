"""Rows, as they are typed and as they are crossed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

from sem_timm import OptionError
from sem_timm.comparison import Row
from sem_timm.comparison.rows import make_rows, parse_rows


def test_rows_are_read_as_typed() -> None:
    rows = parse_rows('none,se sem:operators=eca,ie:position=output eca:target=layer3.*:train=new+norms:name=late')
    assert [row.name for row in rows] == ['none', 'se', 'sem operators=eca,ie position=output', 'late']
    assert rows[2].options == {'operators': ('eca', 'ie'), 'position': 'output'}
    assert parse_rows('sem:name=none:target=layer3.0,layer4.0')[0] == Row(
        name='none', operation='sem', target=('layer3.0', 'layer4.0')
    )
    late = rows[3]
    assert (late.operation, late.target, late.train, late.options) == ('eca', 'layer3.*', 'new+norms', {})
    assert parse_rows('none,sem:operators=eca,ie') == [
        Row(operation='none'),
        Row(operation='sem', options={'operators': ('eca', 'ie')}),
    ]


@pytest.mark.parametrize('target', [r'layer\d{1,2}', r'(?:layer3|layer4)\.[0,1]', r'layer4.*'])
def test_marks_in_the_brackets_of_an_expression_part_nothing(target: str) -> None:
    assert parse_rows(f'sem:target={target}:train=new') == [Row(operation='sem', target=target, train='new')]
    assert parse_rows(f'sem:target=layer2.0,{target}')[0].target == ('layer2.0', target)


@pytest.mark.parametrize(
    ('text', 'part'),
    [
        ('none,semm', "operation 'semm' is unknown. Close: sem"),
        ('cbam', "timm's own attention of that name is asked for as 'timm_cbam'"),
        ('sem:reduktion=8', "option 'reduktion' of operation 'sem' is unknown"),
        ('sem:reduction', 'is not of the form key=value'),
        ('sem:reduction=8,se', 'ends at a space, not at a comma'),
        ('sem:train=nu', "train='nu' is unknown"),
        ('sem:train=new:train=all', 'sem: train=... is given twice'),
        ('sem:reduction=4:reduction=8', 'reduction=... is given twice'),
        ('none:target=layer4', "operation='none' takes no target"),
        (':target=a', 'names no operation'),
        ('', 'there is nothing to compare'),
        ('none,sem,none', "row 'none' is there twice; give one of them another name, with :name=again behind it"),
    ],
)
def test_errors_say_what_to_type(text: str, part: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_rows([text], [], [], ['all'])
    assert part in str(caught.value)


def test_targets_positions_and_ways_of_training_are_crossed() -> None:
    rows = make_rows(['none,se', 'external'], ['layer3.*', 'layer4.*'], ['residual', 'output'], ['all'])
    assert len(rows) == 1 + 2 * 2 + 2
    assert next(row.name for row in rows if row.operation == 'se') == 'se position=residual @ layer3.*'
    assert all(not row.options for row in rows if row.operation == 'external')  # which has no position


def test_the_base_has_nothing_new_to_train_and_what_is_put_in_is_trained() -> None:
    rows = make_rows(['none,sem'], [], [], ['head', 'norms', 'new', 'new+norms', 'all'])
    assert [row.train for row in rows if row.operation == 'none'] == ['head', 'norms', 'all']
    assert [row.train for row in rows if row.operation == 'sem'] == ['new', 'new+norms', 'all']
    assert rows[0].name == 'none (head)' and rows[2].name == 'none'


def test_operations_without_a_name_are_refused() -> None:
    with pytest.raises(OptionError, match='has no name that a log could hold'):
        Row(operation=nn.Identity)  # type: ignore[arg-type]


def test_rows_of_python_are_taken_as_they_are() -> None:
    row = Row(name='mine', operation='sem', target=('layer3.0', 'layer4.0'), options={'reduction': 8})
    assert make_rows([row, 'none'], ['layer1.*'], [], ['all'])[0] == replace(row, train='all')


def test_what_is_typed_goes_before_what_is_crossed() -> None:
    rows = make_rows(['none se:train=all:position=output eca'], [], ['residual', 'output'], ['new'])
    assert [(row.operation, row.train, row.options.get('position')) for row in rows] == [
        ('none', 'head', None),
        ('se', 'all', 'output'),
        ('eca', 'new', 'residual'),
        ('eca', 'new', 'output'),
    ]


def test_a_row_is_what_a_log_gives_back_or_none_at_all() -> None:
    row = Row(operation='sem', target=['layer3.0'], options={'operators': ['eca', 'ie']})  # type: ignore[arg-type]
    assert Row(**json.loads(json.dumps(row.to_dict()))) == row
    with pytest.raises(OptionError, match='has what a log cannot hold'):
        Row(operation='sem', options={'operators': ('se', nn.Identity)})
