"""Adapters by PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model

from tests.clients.models import assert_close, images, models, swapped
from tests.finetuning.small_runs import run_small, write_images
from tests.lively import lively

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


def test_fine_tuning_with_adapters_leaves_a_plain_network(tmp_path: Path) -> None:
    """`sem_timm.finetune(train='lora')`, alone and beside gates: what is trained, and weights merged at the end"""
    data = write_images(tmp_path / 'images')
    for train, operation in (('lora', 'none'), ('new+lora', 'sem')):
        network = lively(timm.create_model('test_resnet', num_classes=3))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        result = run_small(data, tmp_path / train, network=network, operation=operation, train=train, lr=0.01)
        after = result.model.state_dict()
        changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
        assert not any('lora' in name or 'base_layer' in name for name in after)
        assert {'conv1.0.weight', 'fc.weight'} <= {*changed} and not any('bn' in name for name in changed)
        assert 0 < result.num_trained_parameters < result.num_parameters / 3
        assert (operation == 'sem') is any('.sem.' in name for name in after)
