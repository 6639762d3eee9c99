"""Models of timm in transformers: as a backbone, wrapped, and in its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

import sem_timm
from tests.clients.models import Models, images
from tests.lively import lively
from tests.twins import trained

PROGRAM = 'transformers'
PACKAGES = ('transformers',)


def three(build: Any, part: Any) -> Models:
    plain = lively(build()).eval()
    patched, stirred = build().eval(), build().eval()
    for each in (patched, stirred):
        each.load_state_dict(plain.state_dict())
        sem_timm.patch_model(part(each), input_size=(3, 64, 64))
    trained(part(stirred))
    return Models(plain, patched, stirred)


def test_backbone() -> None:
    """Feature maps of `TimmBackbone`"""
    config = TimmBackboneConfig(backbone='resnet18', use_pretrained_backbone=False, out_indices=[1, 2, 3, 4])

    def use(model: Any) -> Any:
        with torch.no_grad():
            return list(model(images()).feature_maps)

    three(lambda: TimmBackbone(config), lambda model: model._backbone).compare(use)


def wrapped() -> Any:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture='test_resnet', num_labels=4))


def test_wrapper_by_name_of_a_variant() -> None:
    """`TimmWrapperForImageClassification` by the name of a variant, saved and loaded"""
    config = TimmWrapperConfig(architecture='test_resnet_sem', num_labels=4)
    model = trained(TimmWrapperForImageClassification(config)).eval()
    assert len(sem_timm.patched_modules(model)) == 4
    with torch.no_grad():
        assert torch.isfinite(model(images()).logits).all()


def test_trainer(tmp_path: Path) -> None:
    """The loss of the first step of `Trainer`"""
    data = [{'pixel_values': image, 'labels': index % 4} for index, image in enumerate(images(8))]

    def use(model: Any) -> Any:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            seed=0,
            report_to=[],
            use_cpu=True,
            save_strategy='no',
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_steps=1,
            learning_rate=1e-2,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return torch.tensor([entry['loss'] for entry in trainer.state.log_history if 'loss' in entry][:1])

    three(wrapped, lambda model: model.timm_model).compare(use, 1e-6)
