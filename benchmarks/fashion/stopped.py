"""A training that was stopped, on disk after each epoch, so that it goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sem_timm.files import replace_whole


def kept_file(folder: Path, key: dict[str, Any]) -> Path:
    """The file of one training, to be removed when its figures are where they stay."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f'{name}.pt'


class Kept:
    """What is kept of one training.

    Args:
        folder: Where it is, with those of others.
        key: What tells it from others.
        model: The model that is trained.
        optimizer: Its optimizer.
        generator: What the order of images is drawn from.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        self.path = kept_file(folder, key)
        self.model, self.optimizer, self.generator = model, optimizer, generator

    def restored(self) -> dict[str, Any]:
        """Puts everything back as it was, and returns the figures so far; those of a beginning if there is no file."""
        if not self.path.exists():
            return {'losses': [], 'decided': [], 'seconds': 0.0, 'cpu_seconds': 0.0}
        found = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(found['model'])
        self.optimizer.load_state_dict(found['optimizer'])
        self.generator.set_state(found['generator'].cpu())
        torch.set_rng_state(found['random'].cpu())
        state: dict[str, Any] = found['state']
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Writes the file, in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'generator': self.generator.get_state(),
            'random': torch.get_rng_state(),
            'state': state,
        }

        def write(path: Path) -> None:
            with path.open('wb') as file:
                torch.save(content, file)

        replace_whole(self.path, write)
