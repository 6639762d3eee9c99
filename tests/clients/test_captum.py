"""Attributions by captum."""

from __future__ import annotations

from typing import Any

from captum.attr import IntegratedGradients, LayerGradCam

from tests.clients.models import images, models

PROGRAM = 'captum'
PACKAGES = ('captum',)


def test_attributions() -> None:
    """`IntegratedGradients` of the input and `LayerGradCam` of a patched block"""

    def use(model: Any) -> Any:
        inputs = IntegratedGradients(model).attribute(images(), target=1, n_steps=4)
        layer = LayerGradCam(model, model.layer2[0]).attribute(images(), target=1)
        return [inputs.detach(), layer.detach()]

    models().compare(use, 1e-5)
