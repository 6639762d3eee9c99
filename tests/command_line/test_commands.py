"""The commands, as they are typed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import typer

from sem_timm.command_line import main
from sem_timm.command_line.application import create_application
from sem_timm.command_line.commands import finetune as finetune_command
from sem_timm.command_line.values import complete_model, complete_operation
from sem_timm.errors import OptionError
from sem_timm.finetuning import FinetuneOptions, StoppedError
from sem_timm.finetuning.baseline import options_without
from sem_timm.finetuning.checkpoints import find_checkpoint, read_state
from sem_timm.operations import operation_names
from sem_timm.typed_values import parse_pairs
from tests.finetuning.small_runs import write_images
from tests.thorough import first_of_each, thorough
from tests.versions import save_for_hf, since_timm

COMMANDS = ('list', 'plan', 'explain', 'finetune', 'compare', 'decisions', 'transfer', 'search', 'fold', 'bench')
SMALL = ['finetune', 'test_resnet', '--no-pretrained', '--image-size', '16', '--batch-size', '8', '--epochs', '1']


def test_help_lists_the_commands_and_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['--help']) == 0
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if f' {name} ' not in printed] == []
    for command in COMMANDS:
        assert main([command, '--help']) == 0
        assert 'Examples:' in capsys.readouterr().out


def test_without_a_command_the_help_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert ' finetune ' in printed.out and printed.err == ''


@pytest.mark.parametrize(
    'command', first_of_each([['-m', 'sem_timm'], ['-c', 'import sem_timm.command_line as c; exit(c.main())']])
)
def test_command_is_the_same_as_a_module_and_as_an_entry_point(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, 'plan', 'resnett18'], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith("sem-timm: model 'resnett18' is unknown. Close: resnet18")
    assert done.stderr.count('\n') == 1


@thorough
@pytest.mark.parametrize(('number', 'code'), [('SIGINT', 130), ('SIGTERM', 143)])
def test_signal_ends_a_command_without_a_word(number: str, code: int) -> None:
    script = (
        'import os, signal, sys, sem_timm.command_line as c, sem_timm.command_line.commands.plan as plan\n'
        'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # a process in the background is born deaf to it
        f'plan.plan_model = lambda *a, **k: os.kill(os.getpid(), signal.{number})\n'
        'sys.argv = ["sem-timm", "plan", "test_resnet"]\n'
        'sys.exit(c.main())\n'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, '', '')


def test_first_signal_is_told_when_a_second_one_comes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(**given: object) -> None:
        try:
            raise StoppedError(signal.SIGINT, 'after step 3')
        finally:
            raise SystemExit(143)

    monkeypatch.setattr(finetune_command, 'options_of_run', stop)
    assert main(['finetune']) == 130
    assert capsys.readouterr().err == 'sem-timm: SIGINT stopped the training after step 3\n'


def test_commands_have_the_same_options_for_the_same_things() -> None:
    for command in typer.main.get_group(create_application()).commands.values():
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert '--operation' not in names or '-o' in names, command.name
        assert '--target' not in names or '--exclude' in names or command.name == 'compare', command.name


def test_compare_says_what_options_of_a_training_mean_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['compare', '--help']) == 0
    shown = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    assert 'held out in the tries of --search, by default 0.2.' in shown and 'instead of on the validation' not in shown
    assert 'Seed of what is held out, for all seeds of runs alike; by default 0.' in shown


def test_list_filters_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['list', 'vit_tiny_patch16_2*', '--json']) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row['model'] == 'vit_tiny_patch16_224' and row['attention_sites'] == 12
    assert row['variants'] == [f'vit_tiny_patch16_224_{kind}' for kind in ('sem', 'ea', 'eamlp', 'monarch')]
    assert 'augreg_in21k' in row['pretrained']
    assert main(['list', 'resnet18']) == 0
    assert 'resnet18_sem' in capsys.readouterr().out
    assert main(['list', '--operations', '--json']) == 0
    assert json.loads(capsys.readouterr().out) == list(operation_names())
    assert main(['list', 'resnettt']) == 2
    assert 'no model is called like' in capsys.readouterr().err


def test_plan_prints_table_json_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    options = ['test_resnet', '--set', 'reduction=8', '--set', 'operators=se,eca', '--target', 'layer[34].*']
    assert main(['plan', *options]) == 0
    assert 'layer3.0' in (table := capsys.readouterr().out) and 'layer1' not in table
    assert main(['plan', *(option.replace('se,eca', "('se','eca')") for option in options)]) == 0
    assert capsys.readouterr().out == table
    assert main(['plan', *options, '--json', '--image-size', '64']) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan['operation']['reduction'] == 8 and plan['operation']['operators'] == ['se', 'eca']
    assert plan['input_size'] == [3, 64, 64]
    assert main(['plan', 'test_vit', '-o', 'external', '--code', 'blocks.0.attn']) == 0
    assert 'self.core' in capsys.readouterr().out


def test_explain_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['explain', 'cait_xxs24_224', 'blocks_token_only.0.attn', '-o', 'external', '--set', 'memory=8']
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert 'single query token' in printed and 'surgery/swap/queries.py' in printed and 'self.q(' in printed
    assert main([*arguments, '--json']) == 0
    data = json.loads(capsys.readouterr().out)
    assert data['refusal']['decided_by'] == 'surgery/swap/queries.py' and data['refusal']['text'] in printed
    assert main(['explain', 'test_resnet', 'layer1.0', '--image-size', '64', '--model-options', 'in_chans=1']) == 0
    assert 'It is a site' in (printed := capsys.readouterr().out) and '1 x 64 x 64' in printed


@pytest.mark.parametrize(
    ('arguments', 'shape'),
    [
        (['vit_tiny_patch16_224', '--target', 'blocks.0'], [3, 96, 96]),  # which timm builds for images of one size
        (['test_vit_ea', '--operation', 'eca', '--model-options', 'in_chans=1'], [1, 96, 96]),
        (['test_resnet', '--model-options', 'in_chans=1'], [1, 96, 96]),
    ],
)
def test_plan_takes_the_images_that_finetune_takes(
    arguments: list[str], shape: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['plan', *arguments, '--json', '--image-size', '96']) == 0
    assert json.loads(capsys.readouterr().out)['input_size'] == shape


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (['plan', 'resnet18', '--set', 'reduktion=3'], "option 'reduktion' of operation 'sem' is unknown"),
        (['plan', 'resnet18', '--set', 'reduction'], 'is not of the form key=value'),
        (
            ['plan', 'resnet18', '--set', "operators=('eca'"],
            'neither JSON nor a Python literal. Several names are typed',
        ),
        (['plan', 'resnet18', '--set', 'operators=(eca,ie)'], '--set operators=a,b'),
        (['plan', 'resnet18', '--target', 'layer9'], "target 'layer9' matches no module"),
        (['plan', 'resnet18', '--code', 'conv1'], "'conv1' is not a site"),
        (['plan', 'test_vit', '-o', 'semm'], "operation 'semm' is unknown"),
        (['plan'], 'Missing argument'),
        (['explain', 'resnet18', 'layer9.0'], "'layer9.0' is no module of ResNet. Close: layer"),
        (['explain', 'resnett18', 'layer1.0'], "model 'resnett18' is unknown. Close: resnet18"),
        (['plam'], 'No such command'),
        (['finetune', '--epochs', 'many'], "Invalid value for '--epochs'"),
        (['finetune', '--epochs', '0'], 'epochs=0 is out of range'),
        (['finetune', '--bogus'], 'No such option: --bogus'),
        (['finetune', '--resume', '/nowhere'], '/nowhere is no folder of a run'),
        (['bench', 'gat'], "benchmark 'gat' is unknown. Close: gate"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.startswith('sem-timm: ') and part in printed.err
    assert printed.err.count('\n') == 1


def test_finetune_prints_what_was_gained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ['--data', str(write_images(tmp_path / 'data'))]
    run = ['--output', str(tmp_path / 'run'), '--cpu']
    assert main([*SMALL, *data, *run, '--compare', '--new-lr-scale', '2']) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith('test_resnet with sem: accuracy ') and 'of 15 images read right' in printed.out
    assert 'The same recipe without sem' in printed.out
    assert 'new modules, weight decay, learning rate x 2' in printed.err
    assert list((tmp_path / 'run' / 'tensorboard').glob('events*'))
    assert (
        main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '12']) == 2
    )  # typed, though it is the default
    assert 'leave out epochs' in capsys.readouterr().err
    # As if the comparison had been stopped before its first checkpoint.
    shutil.rmtree(tmp_path / 'run' / 'without_operation' / 'checkpoints')
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--json', '--compare', '--no-progress']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['num_steps'] == 6 and result['without_operation']['num_new_parameters'] == 0
    assert result['num_new_parameters'] > 0


def test_variant_is_compared_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ['--data', str(write_images(tmp_path / 'data')), '--no-progress', '--cpu', '--json', '--compare']
    variant = ['test_resnet_sem', '--model-options', 'sem_reduction=8', '--model-options', 'drop_rate=0.1']
    assert main(['finetune', *variant, *SMALL[2:], *data, '--output', str(tmp_path / 'run')]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result['model'], result['operation']) == ('test_resnet_sem', 'sem')
    without = result['without_operation']
    assert (without['model'], without['operation'], without['num_new_parameters']) == ('test_resnet', 'none', 0)
    assert without['num_parameters'] == result['num_parameters'] - result['num_new_parameters']
    options = json.loads((tmp_path / 'run' / 'without_operation' / 'options.json').read_text())
    assert options['model_options'] == {'drop_rate': 0.1}


def test_base_of_a_variant_begins_without_weights_where_the_variant_does() -> None:
    # Attention variants have no weights of their own.
    without = options_without(FinetuneOptions(model='test_vit_ea', data='photos'))
    assert (without.model, without.pretrained) == ('test_vit', False)
    without = options_without(FinetuneOptions(model='test_resnet_sem.r160_in1k', data='photos'))
    assert (without.model, without.pretrained) == ('test_resnet.r160_in1k', True)


def test_comparison_that_cannot_be_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / 'run', ['--data', str(write_images(tmp_path / 'data')), '--cpu', '--no-progress']
    assert main([*SMALL, *data, '--output', str(run), '--operation', 'none', '--compare']) == 2
    assert 'leaves nothing to compare with' in capsys.readouterr().err and not run.exists()
    assert main([*SMALL, *data, '--output', str(run), '--operation', 'none', '--stop-at', '2']) == 143
    before = read_state(find_checkpoint(run)[1])
    assert main(['finetune', '--resume', str(run), '--compare', '--no-progress']) == 2
    assert read_state(find_checkpoint(run)[1]) == before


@since_timm('1.0.16', 'models of local-dir:')
def test_result_is_told_where_the_comparison_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ['--data', str(write_images(tmp_path / 'data')), '--cpu', '--no-progress', '--compare']
    save_for_hf(timm.create_model('test_resnet_sem', num_classes=3), tmp_path / 'hub')
    model = f'local-dir:{tmp_path / "hub"}'
    assert main(['finetune', model, *SMALL[2:], *data, '--output', str(tmp_path / 'run')]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f'{model} with sem: accuracy ') and 'The same recipe' not in printed.out
    assert 'is a test_resnet_sem, so that sem cannot be left out; to compare, give test_resnet' in printed.err
    assert not (tmp_path / 'run' / 'without_operation').exists()


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['bench', '--list']) == 0
    printed = capsys.readouterr().out
    assert 'gate ' in printed and 'measuring' not in printed


@thorough
def test_one_command_measures_all_that_has_a_goal(tmp_path: Path) -> None:
    assert main(['bench', '--quick', '--zoo', '--out', str(tmp_path)]) == 0
    (file,) = (path for path in tmp_path.glob('*.json'))
    parts = json.loads(file.read_text())['cpu']
    assert list(parts) == ['gate', 'models', 'patching', 'layer', 'model', 'zoo']
    assert all(line['value'] > 0 and line['sides'] for part in parts.values() for line in part['lines'].values())
    assert all(part['machine']['threads'] == 1 and part['machine']['torch'] for part in parts.values())
    text = file.with_suffix('.md').read_text()
    assert all(name in text for part in parts.values() for name in part['lines'])
    assert file.with_suffix('.png').stat().st_size > 1000


def test_values_are_read_as_typed() -> None:
    pairs = ['a=1', 'b=0.5', 'c=true', 'd=none', 'e=x', 'f=x,2', 'g=[1, 2]', 'h=x,']
    expected = {'a': 1, 'b': 0.5, 'c': True, 'd': None, 'e': 'x', 'f': ('x', 2), 'g': (1, 2), 'h': ('x',)}
    assert parse_pairs(pairs, '--set') == expected
    pairs = ["a=('eca','ie')", "b=['eca', 'ie']", 'c=(1, None, True)', 'd=None', 'e=(8,)', 'f=.5', "g='x,y'", 'h=(2)']
    literals = {'a': ('eca', 'ie'), 'b': ('eca', 'ie'), 'c': (1, None, True), 'd': None, 'e': (8,), 'f': 0.5}
    assert parse_pairs(pairs, '--set') == {**literals, 'g': 'x,y', 'h': 2}
    with pytest.raises(OptionError, match='given twice'):
        parse_pairs(['a=1', 'a=2'], '--set')


def test_shell_completes_models_and_operations() -> None:
    assert 'resnet18_sem' in complete_model('resnet18')
    assert complete_operation('ext') == ['external', 'external2d']


@pytest.mark.slow
def test_finetune_without_arguments_learns_the_digits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'sem_timm', 'finetune', '--json', '--output', str(tmp_path / 'run')],
        capture_output=True,
        text=True,
        timeout=600,
    )
    result = json.loads(done.stdout)
    assert result['before'] < 0.3 and result['after'] > 0.95
    assert result['without_operation']['after'] > 0.95
