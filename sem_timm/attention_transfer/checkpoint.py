"""A transfer on disk after each of its stages, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair
from sem_timm.attention_transfer.processes import done_by_main
from sem_timm.attention_transfer.result import Stage
from sem_timm.errors import OptionError
from sem_timm.files import replace_whole


class Checkpoint:
    """The file of one transfer.

    Args:
        path: Where it is, or will be after the first stage.
        pair: The model that learns.
        options: How it does.

    Raises:
        OptionError: If its folder does not exist, or there is a file that is no transfer, or one of another model or
            with other options.
    """

    def __init__(self, path: Path, pair: Pair, options: TransferOptions) -> None:
        self.path, self.pair = path, pair
        layers = {layer.name: str(layer.edit.operation) for layer in pair.layers}
        shapes = {name: list(pair.student.get_parameter(name).shape) for name in pair.trained}
        how = {**asdict(options), 'swapped': layers, 'trained': shapes}
        self.told: dict[str, Any] = json.loads(json.dumps(how))
        self._found = done_by_main(self._read)

    def restore(self) -> tuple[list[Stage], dict[str, Tensor]]:
        """The stages that are done, and what they gave, which the student now has; nothing and nothing at first."""
        learned: dict[str, Tensor] = self._found['learned']
        with torch.no_grad():
            for name, tensor in learned.items():
                self.pair.student.get_parameter(name).copy_(tensor)
        stages = [Stage(**{**stage, 'losses': tuple(stage['losses'])}) for stage in self._found['stages']]
        return stages, learned

    def save(self, stages: list[Stage], learned: dict[str, Tensor]) -> None:
        """Writes the stages that are done, and what they gave."""
        content = {'told': self.told, 'stages': [asdict(stage) for stage in stages], 'learned': learned}

        def write(path: Path) -> None:
            with path.open('wb') as file:
                torch.save(content, file)

        done_by_main(lambda: replace_whole(self.path, write))

    def _read(self) -> dict[str, Any]:
        if not self.path.parent.is_dir():
            raise OptionError(f'checkpoint={str(self.path)!r}: there is no folder {str(self.path.parent)!r}.')
        if not self.path.exists():
            return {'stages': [], 'learned': {}}
        try:
            found: dict[str, Any] = torch.load(self.path, map_location='cpu', weights_only=True)
            told: dict[str, Any] = found['told']
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise OptionError(
                f'checkpoint={str(self.path)!r} is no transfer that was stopped; name a new file.'
            ) from error
        differing = [name for name in {**self.told, **told} if self.told.get(name) != told.get(name)]
        if differing:
            pairs = [f'{name}={told.get(name)!r} there and {self.told.get(name)!r} here' for name in differing]
            if {'swapped', 'trained'} & set(differing):
                pairs = ['another model or swap']
            raise OptionError(
                f'checkpoint={str(self.path)!r} is of another transfer: {", ".join(pairs)}. Go on with the options it '
                'was begun with, or name a new file.'
            )
        return found
