"""What mkdocs does beside rendering docs/: pages from the root of the repository, of figures, and of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

# Pages that people look for at the root of a repository, and where the documentation has them.
ROOT_PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}

_LINK = re.compile(r'(?<=\]\()(?!https?:|#)([^)#\s]+)')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages that no entry of the navigation names, so that a new one needs no entry of its own."""
    assert config.nav is not None
    named = set(_leaves(config.nav))
    others = [page.name for page in sorted(Path(config.docs_dir).glob('*.md')) if page.name not in named]
    config.nav.insert(-1, {'Figures': others})
    return config


def _leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _leaves(inner)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, and whatever of the repository they link to, with links that fit."""
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=_LINK.sub(lambda link: _moved(link[1]), text)))
        for target in set(_LINK.findall(text)):
            if _moved(target) == target and (ROOT / target).is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    files.append(File.generated(config, 'reference/command_line.md', content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of guides to the root of the repository, as they are read there, to where the documentation has it."""
    return _LINK.sub(lambda link: f'../{_moved(link[1][6:])}' if link[1].startswith('../../') else link[1], markdown)


def _moved(target: str) -> str:
    """Where the documentation has what a page at the root links to."""
    return ROOT_PAGES.get(target, target.removeprefix('docs/'))


def _commands() -> str:
    """The help texts of all commands as one page."""
    import typer
    from typer.cli import get_docs_for_click

    from sem_timm.command_line.application import create_application

    command = typer.main.get_command(create_application())
    return get_docs_for_click(obj=command, ctx=typer.Context(command, info_name='sem-timm'), name='sem-timm')
