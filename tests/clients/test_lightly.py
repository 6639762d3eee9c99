"""Self-supervised learning by lightly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum

from tests.clients.models import images, models

PROGRAM = 'lightly'
PACKAGES = ('lightly',)


def test_contrastive_loss_and_momentum_encoder() -> None:
    """The loss of SimCLR on two views, and a momentum encoder"""

    def use(model: Any) -> Any:
        torch.manual_seed(0)
        backbone, head = copy.deepcopy(model).train(), SimCLRProjectionHead(8, 8, 4)
        momentum = copy.deepcopy(backbone)
        deactivate_requires_grad(momentum)
        update_momentum(backbone, momentum, 0.9)
        x = images(4)
        loss = NTXentLoss()(head(backbone(x)), head(momentum(x.flip(-1))))
        loss.backward()
        return loss.detach()

    models().compare(use)
