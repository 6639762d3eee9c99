"""``sem-timm fold``: the gates of a trained model into its weights, and timm's plain network out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import timm
import typer
from safetensors.torch import save_file

from sem_timm.command_line.arguments import AsJson, MaxBatches, OtherImages, RunFolder
from sem_timm.errors import OptionError
from sem_timm.finetuning.files import explained, write_whole
from sem_timm.finetuning.runs import open_run
from sem_timm.folding import FoldResult, fold_gates
from sem_timm.registry import base_architecture, base_arguments

_ENDING = '.safetensors'


def command(
    run: RunFolder,
    data: OtherImages = None,
    max_loss: Annotated[
        float | None, typer.Option(help='Fold only gates whose block loses no more, such as 0.01.', min=0.0)
    ] = None,
    max_batches: MaxBatches = None,
    output: Annotated[Path | None, typer.Option(help='New file for the weights, a .safetensors.')] = None,
    as_json: AsJson = False,
) -> None:
    """Fold the gates of a trained model into its weights: each becomes its mean over the validation images.

    The scales and shifts of ssf fold as they are. Prints what each block loses, and the accuracy before and after. What
    --output holds is loaded by timm alone, so that no gate may stay.

    Examples: `sem-timm finetune --output run` and then `sem-timm fold run --output folded.safetensors`.
    """
    if output is not None and (output.exists() or output.suffix != _ENDING):
        why = 'exists; name a new file' if output.exists() else f'is no name of a {_ENDING} file'
        raise OptionError(f'--output {output} {why}, such as --output {output.with_suffix("")}-folded{_ENDING}.')
    if output is not None:
        with explained(output):
            output.parent.mkdir(parents=True, exist_ok=True)
    opened = open_run(run, data=data)
    result = fold_gates(opened.model, opened.validation, max_loss=max_loss, max_batches=max_batches)
    print(json.dumps(result.to_dict(), indent=1) if as_json else result)
    if output is None:
        return
    if not result.is_plain:
        raise OptionError(_stays(result))
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in opened.model.state_dict().items()}
    write_whole(output, lambda path: save_file(weights, str(path)))
    if not as_json:
        name, _ = timm.models.split_model_name_tag(opened.options.model)
        own = base_arguments(name, opened.options.model_options)
        given = ''.join(f', {key}={value!r}' for key, value in own.items())
        print(f"Weights: timm.create_model('{base_architecture(name)}', checkpoint_path='{output}'", end='')
        print(f', num_classes={getattr(opened.model, "num_classes", None)}{given})')


def _stays(result: FoldResult) -> str:
    names = [row.name for row in result.gates if row.reason]
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    way = 'Leave --max-loss out or raise it, or l' if any('max_loss' in row.reason for row in result.gates) else 'L'
    return (
        f'{", ".join(names[:3])}{more} could not be folded, so that timm alone could not load what is left. '
        f'{way}eave --output out; sem_timm.open_run and torch.export make a program of a model with gates.'
    )
