"""Adapters by PEFT."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.clients.models import assert_close, images, models, swapped

PROGRAM = 'peft'
PACKAGES = ('peft',)


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, init_lora_weights=False, **options)).eval()


def test_lora_in_layers_of_the_base_and_gates_trained_beside() -> None:
    """LoRA in convolutions of the base with `modules_to_save=['sem']`: outputs, what is trained, merged weights"""

    def use(model: Any) -> Any:
        with torch.no_grad():
            return adapted(model, target_modules=r'layer\d\.\d+\.conv\d')(images())

    given = models('resnet18')
    given.compare(use)
    target = r'layer\d\.\d+\.conv\d'
    with_gates = adapted(given.stirred.double(), target_modules=target, modules_to_save=['sem']).double()
    trainable = {name for name, parameter in with_gates.named_parameters() if parameter.requires_grad}
    assert any('.sem.' in name for name in trainable)
    assert all('lora_' in name or '.sem.modules_to_save.' in name for name in trainable)
    with torch.no_grad():
        expected = with_gates(images().double())
        assert_close(with_gates.merge_and_unload()(images().double()), expected, 1e-9)


def test_lora_in_what_was_put_there() -> None:
    """LoRA in every linear layer and convolution of the gates and of another attention: it counts, and merges"""
    for model, target in (
        (models().stirred, r'.*\.sem\..*(fc1|fc2|conv|decision)'),
        (swapped(img_size=64), r'.*attn\.(qkv|proj)'),
        (swapped(operation='eamlp', img_size=64), r'.*\.(q|mk|mv|proj)'),
    ):
        adapter = adapted(model, target_modules=target)
        with torch.no_grad():
            with_adapter = adapter(images())
            assert not torch.allclose(with_adapter, model(images()), atol=1e-4)
            assert_close(adapter.merge_and_unload()(images()), with_adapter, 1e-5)
