"""Every configuration as JSON and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sem_timm import (
    AttentionConfig,
    ExcitationConfig,
    ExternalAttention2dConfig,
    ScaleAndShiftConfig,
    SEMConfig,
    TimmAttentionConfig,
)
from sem_timm.layers import timm_attention_names
from sem_timm.operations import operation_names
from sem_timm.operations.calls import resolve_operation
from sem_timm.persistence.configurations import config_from_json, config_to_json
from sem_timm.persistence.strict_json import Field


def there_and_back(config: Any) -> Any:
    text = json.dumps(config_to_json(config), allow_nan=False)
    return config_from_json(Field(Path('patch.json'), 'operations[0]', json.loads(text)))


@pytest.mark.parametrize('name', operation_names())
def test_every_operation_by_its_name(name: str) -> None:
    config = resolve_operation(name)
    back = there_and_back(config)
    assert back == config and type(back) is type(config) and str(back) == str(config)


positions = st.sampled_from(['auto', 'residual', 'output'])
branches = st.sampled_from(['last', 'all'])
inits = st.sampled_from(['identity', 'paper'])
numbers = st.integers(1, 512)
operators = st.sampled_from(['se', 'eca', 'ie', 'lct'])
decisions = st.sampled_from(['sigmoid', 'softmax', 'equal'])
where = {'position': positions, 'branches': branches}

CONFIGS = st.one_of(
    st.builds(SEMConfig, numbers, st.lists(operators, min_size=1, max_size=4), inits, decisions, **where),
    st.builds(ExcitationConfig, operators, numbers, inits, **where),
    st.builds(TimmAttentionConfig, st.sampled_from(timm_attention_names()), **where),
    st.builds(ScaleAndShiftConfig, **where),
    st.builds(ExternalAttention2dConfig, numbers, inits, **where),
    st.builds(
        AttentionConfig,
        st.just('external'),
        memory=numbers,
        norm=st.sampled_from(['double', 'softmax']),
        num_heads=st.integers(1, 8),
    ),
    st.builds(
        AttentionConfig, st.just('eamlp'), attn_drop=st.floats(0, 1), qkv_bias=st.booleans(), norm_layer=st.none()
    ),
    st.builds(AttentionConfig, st.just('halo'), block_size=numbers, halo_size=numbers),
    st.builds(AttentionConfig, st.just('monarch'), block_size=numbers, passes=numbers),
    st.builds(AttentionConfig, st.just('catt'), dictionary=numbers),
)


@settings(deadline=None)
@given(CONFIGS)
def test_every_option(config: Any) -> None:
    assert there_and_back(config) == config
