"""Maps by grad-cam."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from tests.clients.models import images, models

PROGRAM = 'grad-cam'
PACKAGES = ('pytorch_grad_cam',)


def test_maps() -> None:
    """`GradCAM` of the last stage"""

    def use(model: Any) -> Any:
        with GradCAM(model, [model.layer3[-1]]) as cam:
            return torch.from_numpy(cam(images(), [ClassifierOutputTarget(1)] * 2))

    models().compare(use, 1e-5)
