"""Quantisation by torchao: of weights, and of exported programs (PT2E)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from tests.clients.models import assert_close, images, models, swapped

PROGRAM = 'torchao'
PACKAGES = ('torchao',)


def test_weight_only_quantisation() -> None:
    """`quantize_` to int8 weights: patched as plain, and close to what was not quantised"""

    def use(model: Any) -> Any:
        model = copy.deepcopy(model)
        quantize_(model, Int8WeightOnlyConfig())
        with torch.no_grad():
            return model(images())

    given = models('test_vit', img_size=64)
    given.compare(use)
    given.compare_with_plain_use(use, images(), 0.05)
    model = swapped(img_size=64)
    with torch.no_grad():
        assert_close(use(model), model(images()), 0.05)


def test_quantised_program() -> None:
    """`prepare_pt2e` and `convert_pt2e` (x86) of exported networks: close to what was not quantised"""

    def use(model: Any) -> Any:
        program = torch.export.export(copy.deepcopy(model).eval(), (images(),)).module()
        prepared = prepare_pt2e(program, _quantizer())
        with torch.no_grad():
            prepared(images())
            return convert_pt2e(prepared)(images())

    models('test_resnet').compare_with_plain_use(use, images(), 0.1)
    models('test_efficientnet').compare_with_plain_use(use, images(), 0.1)
    model = swapped(img_size=64)
    with torch.no_grad():
        assert_close(use(model), model(images()), 0.1)


def test_quantisation_aware_training() -> None:
    """`prepare_qat_pt2e`: a training step reaches every gate"""
    model = models('test_resnet').stirred
    program = torch.export.export(copy.deepcopy(model).train(), (images(),)).module()
    prepared = allow_exported_model_train_eval(prepare_qat_pt2e(program, _quantizer(is_qat=True)))
    prepared.train()
    prepared(images()).sum().backward()
    gradients = {name: p.grad for name, p in prepared.named_parameters() if '.sem.decision.' in name}
    assert gradients.keys() == {name for name, _ in model.named_parameters() if '.sem.decision.' in name}
    assert all(g is not None and g.any() for g in gradients.values())


def _quantizer(is_qat: bool = False) -> Any:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=is_qat))
