"""A frozen network with ImageNet weights, block by block, and a head that is fitted to its optimum."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from ranking.data import Part
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.packaged import EFFICIENTNET, with_packaged_weights

ARCHITECTURE = 'tf_efficientnet_lite0'
BATCH = 50  # of passes without training

_FUSED = {
    'EfficientNet': (('conv_stem', 'bn1'), ('conv_head', 'bn2')),
    'DepthwiseSeparableConv': (('conv_dw', 'bn1'), ('conv_pw', 'bn2')),
    'InvertedResidual': (('conv_pw', 'bn1'), ('conv_dw', 'bn2'), ('conv_pwl', 'bn3')),
}


def frozen_network() -> Any:
    """The network in evaluation mode, its norms folded into its convolutions."""
    options = FinetuneOptions(model=ARCHITECTURE, data='digits', weights=EFFICIENTNET)
    model: Any = with_packaged_weights(timm.create_model(ARCHITECTURE), options).eval()
    for module in list(model.modules()):
        for convolution, norm in _FUSED.get(type(module).__name__, ()):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, getattr(module, norm).act)
    return model.requires_grad_(False)


def block_names(model: Any) -> list[str]:
    """Names of the blocks, in the order of the forward."""
    return [f'blocks.{stage}.{block}' for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]


def stem(model: Any, inputs: Tensor) -> Tensor:
    """What the first block is given."""
    return model.bn1(model.conv_stem(inputs))


def features(model: Any, names: list[str], x: Tensor) -> Tensor:
    """The features (B, 1280) that the head is given, from the input of the first of these blocks, the last ones."""
    for name in names:
        x = model.get_submodule(name)(x)
    return model.bn2(model.conv_head(x)).mean((2, 3))


@torch.no_grad()
def in_batches(function: Any, part: Part | Tensor) -> Tensor:
    """A function of batches, of a whole part or of a tensor."""
    number = len(part)
    batches = ((start, min(start + BATCH, number)) for start in range(0, number, BATCH))
    given = (part.inputs(a, b) if isinstance(part, Part) else part[a:b] for a, b in batches)
    return torch.cat([function(batch) for batch in given])


class Head(nn.Module):
    """Multinomial logistic regression on standardised features, with a penalty on its weights.

    Args:
        reference: Features (N, D) that mean and deviation are taken of.
        num_classes: Number of classes.
        decay: The penalty is this times the sum of the squares of the weights.
    """

    def __init__(self, reference: Tensor, num_classes: int, decay: float) -> None:
        super().__init__()
        self.mean, self.std = reference.mean(0), reference.std(0) + 1e-3
        self.weight = nn.Parameter(torch.zeros(num_classes, reference.shape[1]))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.decay = decay

    def forward(self, values: Tensor) -> Tensor:
        return F.linear((values - self.mean) / self.std, self.weight, self.bias)

    def objective(self, values: Tensor, labels: Tensor) -> Tensor:
        """What is minimised: the mean cross-entropy and the penalty."""
        return F.cross_entropy(self(values), labels) + self.decay * self.weight.square().sum()

    def fit(self, values: Tensor, labels: Tensor) -> Head:
        """To its optimum on features (N, D)."""
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=200, line_search_fn='strong_wolfe')

        def closure() -> Any:
            optimizer.zero_grad()
            loss = self.objective(values, labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        return self

    @torch.no_grad()
    def measured(self, values: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean cross-entropy in nats, and accuracy in percent."""
        logits = self(values)
        right = (logits.argmax(1) == labels).float().mean()
        return {'loss': float(F.cross_entropy(logits, labels)), 'accuracy': 100 * float(right)}
