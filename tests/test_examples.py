"""The examples of fine-tuning."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / 'examples'


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_options_of_the_example_make_a_run(tmp_path: Path) -> None:
    options = load('finetune').options
    assert options.data == 'digits' and options.operation_options == {'reduction': 8}
    assert len((EXAMPLES / 'finetune.py').read_text().splitlines()) <= 22


def test_commands_of_the_swap_are_those_of_the_guide() -> None:
    example = load('swap_trained_vit')
    guide = (EXAMPLES.parent / 'docs' / 'guides' / 'attention.md').read_text()
    shown = re.sub(r' \\\n +', ' ', guide)
    for command in example.COMMANDS:
        assert f'$ {command}\n' in shown
    assert example.as_run('sem-timm search run')[1:] == ['-m', 'sem_timm', 'search', 'run']
    assert Path(example.as_run(example.COMMANDS[0])[1]).is_file()
