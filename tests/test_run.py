"""``python -m sem_timm.run``: scripts that know nothing of this package find its variants."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.thorough import thorough

SCRIPT = """
import sys
import timm
import beside
print(__name__, sys.argv[1:], type(timm.create_model(sys.argv[1]).layer1[0]).__name__, beside.VALUE)
sys.exit(3)
"""


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', *launcher, 'sem_timm.run', *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_script_runs_as_by_itself_with_the_variants_there(tmp_path: Path) -> None:
    (tmp_path / 'train.py').write_text(SCRIPT)
    (tmp_path / 'beside.py').write_text('VALUE = 7')
    done = run(str(tmp_path / 'train.py'), 'test_resnet_sem', '--lr', '1')
    assert done.returncode == 3, done.stderr
    assert done.stdout == "__main__ ['test_resnet_sem', '--lr', '1'] PatchedBasicBlock 7\n"


@thorough
def test_script_behind_a_link_has_the_folder_of_the_script(tmp_path: Path) -> None:
    (tmp_path / 'real').mkdir()
    (tmp_path / 'real' / 'train.py').write_text(SCRIPT)
    (tmp_path / 'real' / 'beside.py').write_text('VALUE = 7')
    (tmp_path / 'link.py').symlink_to(tmp_path / 'real' / 'train.py')
    done = run(str(tmp_path / 'link.py'), 'test_resnet_sem')
    assert done.returncode == 3, done.stderr


@thorough
def test_module_runs_too() -> None:
    done = run('-m', 'timeit', '-n', '1', '-r', '1', 'import timm; timm.create_model("test_resnet_sem")')
    assert done.returncode == 0, done.stderr
    assert '1 loop' in done.stdout


@thorough
def test_script_that_is_not_there_is_an_error() -> None:
    done = run('nowhere.py')
    assert done.returncode == 2
    assert "there is no script 'nowhere.py'" in done.stderr


@thorough
def test_script_runs_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / 'train.py').write_text(
        'import os, sys, timm\n'
        'print(timm.is_model("resnet50_sem"), file=open(os.path.join(sys.path[0], os.environ["RANK"]), "w"))\n'
    )
    launcher = ('torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m')
    done = run(str(tmp_path / 'train.py'), launcher=launcher)
    assert done.returncode == 0, done.stderr
    # Not what they print: both write into one pipe, one between the words of the other.
    assert [(tmp_path / rank).read_text() for rank in '01'] == ['True\n'] * 2
