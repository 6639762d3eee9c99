"""Detection by torchvision, on a backbone of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from tests.clients.models import images, models

PROGRAM = 'torchvision'
PACKAGES = ('torchvision',)


class Pyramid(nn.Module):
    """The last two stages of a network of timm as a pyramid."""

    out_channels = 16

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        torch.manual_seed(0)
        self.pyramid = FeaturePyramidNetwork(body.feature_info.channels(), self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.pyramid({str(index): feature for index, feature in enumerate(self.body(x))})


def detector(body: Any) -> FasterRCNN:
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    pooler = MultiScaleRoIAlign(['0', '1'], output_size=3, sampling_ratio=2)
    parts = {'rpn_anchor_generator': anchors, 'box_roi_pool': pooler, 'box_detections_per_img': 5}
    return FasterRCNN(Pyramid(body), 3, 64, 64, **parts)


def test_detections_and_losses_of_faster_rcnn() -> None:
    """Losses of a training step of Faster R-CNN on a pyramid of a `features_only` backbone, and its detections"""

    def use(body: Any) -> Any:
        model = detector(body)
        target = {'boxes': torch.tensor([[4.0, 4.0, 40.0, 40.0]]), 'labels': torch.tensor([1])}
        torch.manual_seed(0)
        losses = model.train()(list(images()), [target, target])
        with torch.no_grad():
            return [*losses.values(), *model.eval()(list(images()))]

    models(features_only=True, out_indices=(2, 3)).compare(use)


def test_feature_extractor() -> None:
    """Intermediate features of `create_feature_extractor`, which traces the model"""

    def use(model: Any) -> Any:
        with torch.no_grad():
            return create_feature_extractor(model, {'layer1': 'one', 'layer4': 'four'})(images())

    models('resnet18').compare(use)
