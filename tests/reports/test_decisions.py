"""Statistics of decisions against those taken by hand, on models that stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import sem_timm
from sem_timm.errors import ModelError, OptionError
from tests.refusals import refused
from tests.reports.images import batches, decided
from tests.snapshot import assert_same, snapshot


def by_hand(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Decisions (B, n) and gates (B, n, C) of each SEM, from what its input is."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(module: Any, args: Any, *, name: str) -> None:
        pooled = module.pool(args[0])
        weights = torch.sigmoid(module.decision(pooled))
        logits = torch.stack([operator(pooled) for operator in module.operators.values()], 1)
        scale = 1 if module.form == 'paper' else 2
        seen[name] = weights, scale * torch.sigmoid(logits * weights[..., None])

    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: look(m, args, name=name))
        for name, module in model.named_modules()
        if isinstance(module, sem_timm.SEM)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize('init', ['identity', 'paper'])
@pytest.mark.parametrize('architecture', ['test_resnet', 'test_convnext', 'test_mambaout'])
def test_statistics_are_those_of_all_images_at_once(architecture: str, init: str) -> None:
    model = decided(architecture, init=init)
    data = batches()
    found = sem_timm.decisions(model, data)
    seen = by_hand(model, torch.cat([images for images, _ in data]))
    assert found.num_images == 12 and set(found.forms) == {init}
    assert [f'{block}.sem' for block in found.blocks] == list(seen)
    for row, (weights, gates) in enumerate(seen.values()):
        expected = weights.mean(0), weights.std(0, correction=0), gates.mean((0, 2)), gates.mean(2).std(0, correction=0)
        measured = (part[row].float() for part in (found.mean, found.spread, found.gate_mean, found.gate_spread))
        for one, other in zip(measured, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # batches of 4 and of 12 differ in rounding
        contrast = gates.std(2, correction=0).mean(0)
        torch.testing.assert_close(found.gate_contrast[row].float(), contrast, rtol=1e-4, atol=1e-6)
        assert found.chosen[row] == found.operators[int(weights.mean(0).argmax())]
    assert found.spread.min() > 0


def test_statistics_by_class_are_those_of_the_images_of_the_class() -> None:
    model, data = decided(), batches()
    found = sem_timm.decisions(model, data, by_class=True)
    images, labels = (torch.cat(parts) for parts in zip(*data))
    assert list(found.classes) == [0, 1, 2]
    for label, one in found.classes.items():
        alone = sem_timm.decisions(model, images[labels == label])
        assert one.num_images == alone.num_images == 4
        for name in ('mean', 'spread', 'gate_mean', 'gate_spread', 'gate_contrast'):
            torch.testing.assert_close(getattr(one, name), getattr(alone, name), rtol=1e-4, atol=1e-6)
    means = torch.stack([one.mean for one in found.classes.values()])
    assert torch.equal(found.class_spread, means.std(0, correction=0))
    low, high = (int(choose(means[:, 0, 0], 0)) for choose in (torch.argmin, torch.argmax))
    assert f'{low}: {means[low, 0, 0]:.3f} … {high}: {means[high, 0, 0]:.3f}' in repr(found)


def test_names_of_classes_may_be_words() -> None:
    images, _ = batches(1)[0]
    found = sem_timm.decisions(decided(), [{'image': images, 'label': ['cat', 'dog', 'cat', 'ant']}], by_class=True)
    assert {label: one.num_images for label, one in found.classes.items()} == {'ant': 1, 'cat': 2, 'dog': 1}


def test_labels_may_be_tensors_in_a_list() -> None:
    images, labels = batches(1)[0]
    found = sem_timm.decisions(decided(), [(images, [*labels])], by_class=True)
    assert {label: one.num_images for label, one in found.classes.items()} == {0: 2, 1: 1, 2: 1}
    assert list(found.to_dict()['classes']) == ['0', '1', '2']


def test_operators_may_differ_between_blocks() -> None:
    model = timm.create_model('test_resnet', num_classes=10)
    sem_timm.patch_model(model, 'sem', target=r'layer[12]\..*', operators=('se', 'se', 'eca'))
    sem_timm.patch_model(model, 'sem', target=r'layer[34]\..*', operators=('lct', 'se'), init='paper')
    found = sem_timm.decisions(model, batches(1))
    assert found.operators == ('se', 'se_2', 'eca', 'lct')
    has = ~found.mean.isnan()
    assert has[0].tolist() == [True, True, True, False] and has[-1].tolist() == [True, False, False, True]
    assert '–' in repr(found)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data['mean'][0][3] is None and data['forms'] == list(found.forms)


def test_all_branches_of_a_block_are_told_apart() -> None:
    model = sem_timm.patch_model(timm.create_model('test_vit', num_classes=10), 'sem', branches='all')
    names = sem_timm.decisions(model, torch.randn(2, 3, 160, 160)).blocks
    assert len(names) == len(set(names)) == 12
    assert all(isinstance(model.get_submodule(name), sem_timm.SEM) for name in names)


def test_layers_that_were_built_in_are_seen() -> None:
    model = timm.create_model('test_resnet', block_args={'attn_layer': sem_timm.SEM})
    assert sem_timm.decisions(model, batches(1)).blocks == tuple(
        name.removesuffix('.se') for name, module in model.named_modules() if isinstance(module, sem_timm.SEM)
    )
    assert sem_timm.decisions(sem_timm.SEM(3), batches(1)).blocks == ('SEM',)


def test_operator_of_ones_own_is_seen() -> None:
    class Same(nn.Module):
        def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__()

        def forward(self, pooled: Tensor) -> Tensor:
            return pooled

    model = sem_timm.patch_model(timm.create_model('test_resnet'), 'sem', operators=('se', Same), init='paper')
    assert sem_timm.decisions(model, batches(1)).operators == ('se', 'Same')


@pytest.mark.parametrize('architecture', ['test_resnet', 'levit_128s'])
def test_model_stays_as_it_is(architecture: str) -> None:
    model = decided(architecture).train()
    next(model.children()).eval()  # a mixture of modes
    model.register_forward_hook(lambda *_: pytest.fail('a hook was called'))
    size = 64 if architecture == 'test_resnet' else 224
    before = snapshot(model)
    sem_timm.decisions(model, shuffled(size))
    assert_same(before, snapshot(model))


def shuffled(size: int = 64) -> Iterator[Tensor]:
    """Images that move the random generator, as a loader that shuffles does."""
    for _ in range(2):
        yield torch.randn(2, 3, size, size)


def test_model_stays_as_it_is_after_an_error() -> None:
    model = decided().train()

    def broken() -> Iterator[Tensor]:
        yield from shuffled()
        raise OSError('image 7 is truncated')

    before = snapshot(model)
    with pytest.raises(OSError, match='image 7'):
        sem_timm.decisions(model, broken())
    assert_same(before, snapshot(model))


def test_batches_beyond_the_last_are_left_alone() -> None:
    assert sem_timm.decisions(decided(), batches(3), max_batches=2).num_images == 8


def test_half_precision_gives_what_full_precision_gives() -> None:
    full = sem_timm.decisions(decided(), batches(1))
    half = sem_timm.decisions(decided().to(torch.bfloat16), batches(1))
    torch.testing.assert_close(half.mean, full.mean, rtol=0, atol=0.05)  # eight bits


def test_device_is_one_that_torch_knows() -> None:
    model = decided()
    assert sem_timm.decisions(model, batches(1), device='cpu').num_images == 4
    assert next(model.parameters()).device.type == 'cpu'


@pytest.mark.parametrize(
    ('loader', 'options', 'message'),
    [
        ([], {}, 'no images'),
        ([batches()[0][0]], {'by_class': True}, 'images alone'),
        (batches(), {'max_batches': 0}, 'max_batches=0'),
        (batches(), {'device': 'gpu'}, "device='gpu'"),
        (batches(), {'device': 'meta'}, "device='meta'"),
    ],
)
def test_loaders_without_images_or_labels_are_refused(loader: Any, options: dict[str, Any], message: str) -> None:
    model = decided()
    with refused(model, OptionError, message):
        sem_timm.decisions(model, loader, **options)


def test_models_without_decisions_are_refused() -> None:
    plain = timm.create_model('test_resnet')
    with refused(plain, ModelError, 'no Switchable Excitation Module', "patch_model(model, 'sem')"):
        sem_timm.decisions(plain, batches())
    single = sem_timm.patch_model(timm.create_model('test_resnet'), 'se')
    with refused(single, ModelError, 'decides nothing'):
        sem_timm.decisions(single, batches())
    equal = sem_timm.patch_model(timm.create_model('test_resnet'), 'sem', decision='equal')
    with refused(equal, ModelError, "decision='equal'", 'nothing is decided'):
        sem_timm.decisions(equal, batches())
    weightless = decided().to('meta')
    with refused(weightless, ModelError, 'meta'):
        sem_timm.decisions(weightless, batches())


def test_images_of_a_shape_that_the_model_refuses() -> None:
    model = decided()
    with refused(model, OptionError, 'and was given (1, 64, 64)', 'create_transform'):
        sem_timm.decisions(model, [torch.zeros(2, 1, 64, 64)])


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = decided()
    with refused(model, ModelError, 'layer1.0', 'not finite'):
        sem_timm.decisions(model, torch.full((1, 3, 64, 64), float('nan')))


def test_modules_that_never_run_are_left_out() -> None:
    model = decided()
    model.add_module('spare', sem_timm.SEM(8))
    assert 'spare' not in sem_timm.decisions(model, batches(1)).blocks

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sem = sem_timm.SEM(8)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ModelError, match='none of the 1 SEM'):
        sem_timm.decisions(Idle(), batches(1))


def test_table_names_all_blocks_and_operators() -> None:
    found = sem_timm.decisions(decided(), batches(1))
    lines = repr(found).splitlines()
    assert lines[0].split() == ['block', 'chosen', 'se', 'eca', 'ie', 'se', 'gate', 'eca', 'gate', 'ie', 'gate']
    assert [line.split()[0] for line in lines[2:-1]] == list(found.blocks)
    assert f'{found.mean[0, 0]:.3f} ±{found.spread[0, 0]:.3f}' in lines[2]
    with pytest.raises(OptionError, match='by_class=True'):
        _ = found.class_spread


@pytest.mark.parametrize('by_class', [False, True])
@pytest.mark.parametrize('ending', ['png', 'svg'])
def test_heatmap_is_drawn(tmp_path: Path, ending: str, by_class: bool) -> None:
    found = sem_timm.decisions(decided(), batches(1), by_class=by_class)
    path = found.plot(tmp_path / f'decisions.{ending}')
    if ending == 'png':
        with Image.open(path) as picture:
            width, height = picture.size
        assert width > height * 0.5 and height > 300
    else:
        assert path.read_text(encoding='utf-8').startswith('<?xml')
