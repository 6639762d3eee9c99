"""The pages of the documentation: their Python runs and prints what they say; all that is public is described."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import sem_timm
from sem_timm.command_line.application import create_application
from tests.run_page import blocks_of, run
from tests.thorough import first_of_each, thorough

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
RUNNER = Path(__file__).with_name('run_page.py')
PAGES = [path for path in sorted(DOCS.rglob('*.md')) if blocks_of(path.read_text(encoding='utf-8'))]


def test_guides_have_code() -> None:
    guides = set((DOCS / 'guides').glob('*.md'))
    assert guides and guides <= set(PAGES)


def run_page(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), str(page), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.mark.parametrize('page', first_of_each(PAGES), ids=lambda page: page.stem)
def test_code_of_a_page_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path) -> None:
    result = run_page(page, tmp_path)
    assert result.returncode == 0, result.stderr


@thorough
def test_each_block_of_the_readme_runs_alone(tmp_path: Path) -> None:
    result = run_page(ROOT / 'README.md', tmp_path, '--apart')
    assert result.returncode == 0, result.stderr


def test_other_output_than_the_page_says_is_found(tmp_path: Path) -> None:
    (block,) = blocks_of('# Page\n\n```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n3\n```\n')
    with pytest.raises(AssertionError, match=r'page.md, line 4 prints\n1\n2\n'):
        run(block, tmp_path / 'page.md', {})


def test_every_public_name_is_in_the_reference_once() -> None:
    reference = ''.join(page.read_text(encoding='utf-8') for page in (DOCS / 'reference').glob('*.md'))
    described = re.findall(r'^::: sem_timm\.(\w+)$', reference, re.MULTILINE)
    assert sorted(described) == sorted(sem_timm.__all__)


def test_commands_and_options_that_pages_show_exist() -> None:
    command: Any = typer.main.get_command(create_application())
    pages = [ROOT / 'README.md', ROOT / 'examples' / 'timm_train.md', *DOCS.rglob('*.md')]
    shown = re.findall(
        r'^\$ .*?\bsem[-_]timm (\w+)(.*?)(?:#.*)?$', '\n'.join(page.read_text() for page in pages), re.MULTILINE
    )
    assert len(shown) > 10
    for name, options in shown:
        known = {option for parameter in command.commands[name].params for option in parameter.opts}
        assert set(re.findall(r'(?<= )--[\w-]+', options)) <= known, (name, options)


def test_pages_use_only_public_names() -> None:
    for page in PAGES:
        names = re.findall(r'(?<!-m )\bsem_timm\.(\w+)', page.read_text(encoding='utf-8'))
        assert set(names) <= set(sem_timm.__all__), page.name
