"""What is compared without a word about model, data and recipe: real images, in two to three minutes on two cores."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from sem_timm.comparison.options import LEARNING_RATE
from sem_timm.finetuning.options import BUILT_IN
from sem_timm.finetuning.packaged import EFFICIENTNET, PACKAGED


def demonstration() -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the comparison, and of the recipe.

    With the package of the extra ``demo`` a network that was trained on ImageNet is frozen and learns digits from few
    images: by its head, its norms, or by gates in its blocks or behind its norms, each at the learning rate that suits
    it. Without it a small one is trained from the start.
    """
    architecture, module, _ = PACKAGED[EFFICIENTNET]
    if find_spec(module) is None:
        return {}, {'data': BUILT_IN, 'max_train_images': 400}
    behind_norms = r'ie:position=output:target=(.*\.)?bn\d:train=new:name=ie@norms'
    rows = f'none:train=head none:train=norms sem:train=new {behind_norms}'
    recipe = {
        'model': architecture,
        'weights': EFFICIENTNET,
        'data': BUILT_IN,
        'image_size': 64,
        'max_train_images': 100,
        'channels_last': True,
        'epochs': 8,
        'batch_size': 10,
        'lr': 3e-3,
        'head_scale': 0.0,
        'tuning_fraction': 0.4,
    }
    return {'operations': (rows,), 'seeds': 3, 'search': LEARNING_RATE}, recipe
