"""A patch saved from one model and loaded into another gives the same outputs, bit for bit."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import ModelError, OptionError, PatchFileError
from sem_timm.random_state import random_states
from tests.families import FAMILIES
from tests.persistence.patches import CASES, base, edit_json, of_case, outputs, patch, weights_file
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.twins import inserted


@pytest.mark.parametrize('case', CASES)
def test_patch_comes_back(tmp_path: Path, case: str) -> None:
    name, calls = CASES[case]
    model, other = patch(base(name), *calls, input_size=FAMILIES[name].input_size), base(name)
    before = snapshot(model)
    assert sem_timm.save_patch(model, tmp_path) == tmp_path
    assert_same(before, snapshot(model))
    rng = torch.get_rng_state()
    assert sem_timm.load_patch(other, tmp_path, check_base='error', input_size=FAMILIES[name].input_size) is other
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(outputs(other, name), outputs(model, name))
    assert list(other.state_dict()) == list(model.state_dict())
    here, there = sem_timm.patched_modules(other), sem_timm.patched_modules(model)
    assert [(p.name, p.inserted, p.position) for p in here] == [(p.name, p.inserted, p.position) for p in there]
    frozen = [[n for n, p in m.named_parameters() if not p.requires_grad] for m in (other, model)]
    assert frozen[0] == frozen[1]
    sem_timm.unpatch_model(other)
    assert torch.equal(outputs(other, name), outputs(base(name), name))


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    model = of_case('sem')
    (tmp_path / 'file').write_text('mine')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'patch'):
        with refused(model, PatchFileError, f'{tmp_path / "file"} is a file, and a patch is saved into a folder'):
            sem_timm.save_patch(model, path)
    assert (tmp_path / 'file').read_text() == 'mine'
    saved = sem_timm.save_patch(model, tmp_path / 'saved')
    for file in saved.iterdir():
        with refused(base(), PatchFileError, f'load_patch(model, {str(saved)!r})'):
            sem_timm.load_patch(base(), file)
    with refused(model, PatchFileError, f'Name the folder: {saved}.'):
        sem_timm.save_patch(model, saved / 'patch.json')


def test_two_patches_are_swapped_on_one_base(tmp_path: Path) -> None:
    patches = [patch(base(), ('sem', {})), patch(base(), ('timm_cbam', {'exclude': 'layer1'}))]
    model = base()
    for number, patched in enumerate(patches):
        sem_timm.save_patch(patched, tmp_path / str(number))
    for number in (0, 1, 0, 1):
        sem_timm.load_patch(model, tmp_path / str(number), check_base='error')
        assert torch.equal(outputs(model), outputs(patches[number]))
        sem_timm.unpatch_model(model)
    assert torch.equal(outputs(model), outputs(base()))


def test_a_loaded_patch_is_saved_again_the_same(tmp_path: Path) -> None:
    sem_timm.save_patch(of_case('two_attentions_and_sem'), tmp_path / 'one')
    model = sem_timm.load_patch(base('vit_registers'), tmp_path / 'one')
    sem_timm.save_patch(model, tmp_path / 'two')
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ('one', 'two')]
    assert contents[0] == contents[1]


def test_patch_holds_the_new_tensors_and_no_others(tmp_path: Path) -> None:
    model = of_case('sem')
    sem_timm.save_patch(model, tmp_path)
    tensors = json.loads((tmp_path / 'patch.json').read_text())['tensors']
    assert {name for name in tensors if not name.endswith('.gain')} == set(inserted(model))
    assert {tensor['part'] for tensor in tensors.values()} == {'new'}
    size = sum(tensor.numel() * 4 for tensor in inserted(model).values())
    assert size < weights_file(tmp_path).stat().st_size < size + 100 * len(tensors) + 1000


def test_sizes_that_the_guide_names(tmp_path: Path) -> None:
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ('sem', {}),
        ('sem', {'reduction': 64}),
        ('sem', {'operators': ('eca', 'ie')}),
        ('eca', {}),
    )
    megabytes = []
    for number, call in enumerate(calls):
        model = patch(timm.create_model('resnet50'), call)
        sem_timm.save_patch(model, tmp_path / str(number))
        megabytes.append(weights_file(tmp_path / str(number)).stat().st_size / 1e6)
    named = '{:.1f} MB for SEM as published, {:.1f} MB with `reduction=64`, {:.2f} MB with the operators'
    guide = ' '.join((Path(__file__).parents[2] / 'docs/guides/export.md').read_text().split())
    assert named.format(*megabytes[:3]) in guide
    assert f'{megabytes[3]:.3f} MB for the operation' in guide


def test_patch_of_a_trained_gate_keeps_its_form(tmp_path: Path) -> None:
    model = patch(base(), ('sem', {'init': 'paper'}))
    for module in model.modules():
        if isinstance(module, sem_timm.SEM):
            module.set_form('identity')
    sem_timm.save_patch(model, tmp_path)
    assert torch.equal(outputs(sem_timm.load_patch(base(), tmp_path)), outputs(model))


def test_image_size_and_head_of_the_model_are_its_own(tmp_path: Path) -> None:
    """The base weights differ then, in the position embedding alone, and the warning says so."""
    sem_timm.save_patch(of_case('external'), tmp_path)
    other = base('vit_registers')
    other.set_input_size((96, 96))
    other.reset_classifier(3)
    with pytest.warns(sem_timm.BaseWeightsWarning, match='1 of .* tensors differ; pos_embed has the shape'):
        sem_timm.load_patch(other, tmp_path)
    assert other(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_wrapped_models_are_unwrapped_for_saving(tmp_path: Path) -> None:
    model = of_case('sem')
    wrappers = [torch.nn.DataParallel(model), torch.compile(model), timm.utils.ModelEmaV3(model)]
    for number, wrapped in enumerate(wrappers):
        sem_timm.save_patch(wrapped, tmp_path / str(number))  # type: ignore[arg-type]
        assert torch.equal(outputs(sem_timm.load_patch(base(), tmp_path / str(number))), outputs(model))


def test_copies_and_pickles_can_be_saved(tmp_path: Path) -> None:
    model = of_case('external')
    torch.save(model, tmp_path / 'model.pt')
    for number, other in enumerate([copy.deepcopy(model), torch.load(tmp_path / 'model.pt', weights_only=False)]):
        sem_timm.save_patch(other, tmp_path / str(number))
        loaded = sem_timm.load_patch(base('vit_registers'), tmp_path / str(number))
        assert torch.equal(outputs(loaded, 'vit_registers'), outputs(model, 'vit_registers'))


class Tower(nn.Module):
    """A model that is none of timm's, holds a block under two names, and says nothing of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 32, 3)
        self.blocks = nn.ModuleList(timm.models.resnet.BasicBlock(32, 32) for _ in range(2))
        self.last = self.blocks[1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def test_models_of_ones_own_with_shared_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Tower().eval()
    model, images = patch(copy.deepcopy(plain), input_size=(5, 17, 17)), torch.randn(2, 5, 17, 17)
    sem_timm.save_patch(model, tmp_path)
    assert torch.equal(sem_timm.load_patch(plain, tmp_path, check_base='error')(images), model(images))


class Detector(nn.Module):
    """A model of one's own around one of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = base()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_features(x)
        return features


def test_a_backbone_that_was_patched_before_it_was_wrapped_or_after(tmp_path: Path) -> None:
    before, after, plain = Detector(), Detector(), Detector()
    patch(before.backbone)
    patch(after)
    for number, model in enumerate((before, after)):
        sem_timm.save_patch(model, tmp_path / f'{number}')
        sem_timm.load_patch(plain, tmp_path / f'{number}', check_base='error')
        assert torch.equal(outputs(plain), outputs(model))
        sem_timm.unpatch_model(plain)
        sem_timm.save_patch(model.backbone, tmp_path / f'{number} backbone')
        loaded = sem_timm.load_patch(base(), tmp_path / f'{number} backbone', check_base='error')
        assert torch.equal(outputs(loaded), outputs(model.backbone))


class Halving(nn.Module):
    """An excitation operator of one's own."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled * self.weight

    def zero_last_weights(self) -> None:
        nn.init.zeros_(self.weight)


class OwnCore(sem_timm.AttentionCore):
    """An attention core of one's own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return v


def test_code_of_ones_own_needs_a_name(tmp_path: Path) -> None:
    group_norm = sem_timm.InsertConfig(lambda channels: nn.GroupNorm(4, channels))
    cases: list[tuple[str, Any, dict[str, Any], str]] = [
        ('resnet', 'sem', {'operators': ('se', Halving)}, '(operators=Halving)'),
        ('resnet', group_norm, {}, '(InsertConfig)'),
        ('resnet', sem_timm.ExcitationConfig(Halving), {}, '(excitation=Halving)'),
        ('vit_registers', OwnCore, {}, '(attention=OwnCore)'),
        ('vit_registers', 'eamlp', {'norm_layer': nn.LayerNorm, 'qk_norm': True}, '(norm_layer=LayerNorm)'),
    ]
    for name, operation, options, shown in cases:
        model = patch(base(name), (operation, options))
        with refused(model, ModelError, shown, 'register_excitation', 'state_dict()'):
            sem_timm.save_patch(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_registered_operators_are_saved_by_name(tmp_path: Path) -> None:
    sem_timm.register_excitation('halving_in_patches', Halving)
    by_class = patch(base(), ('sem', {'operators': ('se', Halving)}))
    by_name = patch(base(), ('sem', {'operators': ('se', 'halving_in_patches')}))
    for model in (by_class, by_name):
        sem_timm.save_patch(model, tmp_path)
        assert torch.equal(outputs(sem_timm.load_patch(base(), tmp_path)), outputs(model))
    sem_timm.load_patch(by_class, tmp_path, check_base='error')
    edit_json(tmp_path, lambda data: data['operations'][0]['options'].update(operators=['se', 'halfing']))
    with refused(model := base(), sem_timm.PatchFileError, "'halfing' is unknown", 'register_excitation'):
        sem_timm.load_patch(model, tmp_path)


def test_operators_without_an_identity_load_onto_the_same_patch(tmp_path: Path) -> None:
    sem_timm.register_excitation('without_identity', nn.LayerNorm)
    model = patch(base(), ('sem', {'operators': ('without_identity',), 'init': 'paper'}))
    sem_timm.save_patch(model, tmp_path)
    assert sem_timm.load_patch(model, tmp_path, check_base='error') is model


def test_numbers_that_cannot_be_loaded_are_not_saved(tmp_path: Path) -> None:
    model = patch(base(), ('sem', {'reduction': 2**22}))
    with refused(model, ModelError, "'sem' has what a patch file cannot have", 'reduction: 4194304 is out of range'):
        sem_timm.save_patch(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('size', [64, (3, 64), (4, 64, 64)])
def test_wrong_input_size_is_the_callers_error(tmp_path: Path, size: Any) -> None:
    sem_timm.save_patch(of_case('sem'), tmp_path)
    with refused(model := base(), OptionError, 'input_size='):
        sem_timm.load_patch(model, tmp_path, input_size=size)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    plain, meta, lost = base(), of_case('sem').to('meta'), of_case('external_in_windows')
    sem_timm.drop_unread_parameters(lost)
    wrong = {'ResNet is not patched': plain, 'meta device': meta, 'drop_unread_parameters': lost}
    for part, model in wrong.items():
        with refused(model, ModelError, part):
            sem_timm.save_patch(model, tmp_path)
    model = of_case('sem')
    with sem_timm.disabled(model), refused(model, ModelError, 'switched off'):
        sem_timm.save_patch(model, tmp_path)
    with pytest.raises(ModelError, match='not dict'):
        sem_timm.save_patch({}, tmp_path)  # type: ignore[arg-type]
    headless = patch(base(num_classes=0))
    with refused(headless, OptionError, 'include_head=True'):
        sem_timm.save_patch(headless, tmp_path, include_head=True)
    assert not list(tmp_path.iterdir())


class DrawsInItsForward(nn.Dropout):
    """Draws from every random generator, whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3), random.random(), numpy.random.rand()
        return x


def test_all_random_generators_stand_still(tmp_path: Path) -> None:
    sem_timm.save_patch(of_case('external'), tmp_path)
    model = base('vit_registers')
    model.head_drop = DrawsInItsForward()
    before = random_states()
    sem_timm.load_patch(model, tmp_path, input_size=FAMILIES['vit_registers'].input_size)
    assert random_states() == before


class AdaptedLinear(nn.Module):
    """What PEFT makes of a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(layer.in_features, 2)
        self.active_adapters = ['default']

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y


class PeftModel(nn.Module):
    """What PEFT puts around a model."""

    __module__ = 'peft.peft_model'

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


def test_models_with_adapters_of_peft_are_merged_first(tmp_path: Path) -> None:
    model = of_case('external')
    inside = copy.deepcopy(model)
    inside.blocks[1].mlp.fc1 = AdaptedLinear(inside.blocks[1].mlp.fc1)
    advice = ('merge_and_unload()', 'unload()', 'get_base_model()')
    with refused(inside, ModelError, 'blocks.1.mlp.fc1 is a AdaptedLinear of PEFT', *advice):
        sem_timm.save_patch(inside, tmp_path)
    for around in (PeftModel(model), nn.DataParallel(PeftModel(model))):
        with refused(around, ModelError, 'the model is a PeftModel of PEFT', *advice):
            sem_timm.save_patch(around, tmp_path)
    sem_timm.save_patch(model, tmp_path)
