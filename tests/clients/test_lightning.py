"""Training by Lightning."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.models import images, models

PROGRAM = 'lightning'
PACKAGES = ('lightning',)


class Task(lightning.LightningModule):
    """Classification."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_first_step_of_training() -> None:
    """Loss of the first step of `Trainer.fit`, and that gates are trained"""
    loader = DataLoader(TensorDataset(images(4), torch.arange(4)), 4)

    def use(model: Any) -> Any:
        task = Task(copy.deepcopy(model))
        before = {name: p.clone() for name, p in task.named_parameters()}
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator='cpu',
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=True,
        )
        trainer.fit(task, loader)
        gates = [name for name in before if '.sem.' in name]
        assert not gates or any(not torch.equal(before[name], dict(task.named_parameters())[name]) for name in gates)
        return task.losses[0]

    models().compare(use)
