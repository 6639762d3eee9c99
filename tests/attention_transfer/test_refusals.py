"""What cannot be transferred is refused with what to do instead, and the model is what it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sem_timm
from sem_timm import MissingPackageError, ModelError, OptionError, RefusedError
from sem_timm.attention_transfer import initialize_memories
from tests.attention_transfer.small_transformer import batches, create, labelled, swapped
from tests.refusals import refused
from tests.swap.small_attention import Model, Plain


def test_a_model_in_which_nothing_is_swapped() -> None:
    model = create()
    with refused(model, ModelError, 'was swapped', "patch_model(model, 'external')"):
        sem_timm.transfer(model, batches())


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match=r'a torch\.nn\.Module is needed, not str'):
        sem_timm.transfer('vit_tiny_patch16_224', batches())  # type: ignore[arg-type]


def test_a_model_with_insertions_only() -> None:
    model = sem_timm.patch_model(create(), 'sem')
    with refused(model, ModelError, 'was swapped'):
        sem_timm.transfer(model, batches())


def test_a_model_without_unread_parameters_has_no_original_any_more() -> None:
    model = sem_timm.drop_unread_parameters(swapped('external', model=create(qk_norm=True)))
    with refused(model, ModelError, 'drop_unread_parameters', 'transfer first'):
        sem_timm.transfer(model, batches())


def test_a_wrapped_model_is_to_be_unwrapped() -> None:
    model = torch.nn.DataParallel(swapped())
    with refused(model, ModelError, 'model.module'):
        sem_timm.transfer(model, batches())


def test_a_model_without_weights() -> None:
    model = swapped().to('meta')
    with refused(model, ModelError, 'meta'):
        sem_timm.transfer(model, batches())


def test_a_narrow_type_is_too_coarse() -> None:
    model = swapped().bfloat16()
    with refused(model, OptionError, 'bfloat16', 'model.float()'):
        sem_timm.transfer(model, batches())


def test_whole_modules_have_no_memories_to_initialise() -> None:
    model = swapped('eamlp')
    with refused(model, RefusedError, 'blocks.0.attn', 'eamlp', "stages=('match',)"):
        sem_timm.transfer(model, batches(), stages=('initialize', 'match'))


def test_whole_modules_are_matched() -> None:
    result = sem_timm.transfer(swapped('eamlp'), batches(), epochs=20)
    assert [stage.name for stage in result.stages] == ['original', 'swap', 'match']
    assert result['match'].mean_error < 0.9 * result['swap'].mean_error  # type: ignore[operator]


def test_other_attentions_are_matched_with_what_they_have() -> None:
    # Its cross-sample part starts at zero, so that there is nothing to win back, and nothing moves.
    result = sem_timm.transfer(swapped('catt'), batches())
    assert [stage.name for stage in result.stages] == ['original', 'swap', 'match']
    assert result['match'].mean_error == result['swap'].mean_error < 1e-5  # type: ignore[operator]


def test_attention_without_parameters_has_nothing_new_to_train() -> None:
    model = swapped('efficient')
    with refused(model, RefusedError, 'efficient', "train='projection'"):
        sem_timm.transfer(model, batches())
    result = sem_timm.transfer(model, batches(), train='projection', epochs=10)
    assert result['match'].mean_error < result['swap'].mean_error  # type: ignore[operator]


def test_memories_are_asked_for_where_there_are_none() -> None:
    model = swapped('efficient')
    with refused(model, RefusedError, 'no memories', "'external'"):
        initialize_memories(model, batches())


@pytest.mark.parametrize(
    'loader, parts',
    [
        ([], ['yields no images']),
        (iter([]), ['yields no images']),
        (None, ['NoneType', 'DataLoader']),
        ({'image': torch.zeros(4, 1, 16, 16)}, ['dict', 'DataLoader']),
        (['cat.png'], ['type str', 'create_transform']),
        ([{'picture': torch.zeros(1, 1, 16, 16)}], ["'picture'", "'image'"]),
        ([torch.zeros(4, 1, 16, 16, dtype=torch.uint8)], ['uint8', 'normalised']),
        ([torch.zeros(0, 1, 16, 16)], ['no images']),
    ],
)
def test_loaders_without_images(loader: Any, parts: list[str]) -> None:
    model = swapped()
    with refused(model, OptionError, *parts):
        sem_timm.transfer(model, loader)


def test_an_evaluation_without_images() -> None:
    model = swapped()
    with refused(model, OptionError, 'yields no images'):
        sem_timm.transfer(model, batches(), evaluation=[])


@pytest.mark.parametrize(
    'number, parts',
    [
        (2, ['yields 0 batches', '2 before']),
        (5, ['yields 1 batches', '4 before']),
        (10, ['yields 0 batches', '6 before']),
    ],
)
def test_an_evaluation_that_cannot_be_passed_over_again(number: int, parts: list[str]) -> None:
    model, pairs = swapped(), labelled(create(), number)
    with refused(model, OptionError, *parts, 'not a generator'):
        sem_timm.transfer(model, batches(), evaluation=iter(pairs))


def test_an_evaluation_that_runs_dry_between_stages() -> None:
    class Drying:
        left = 3 * 2 + 1  # batches, of which three passes take two each: the first batches, the original, the swap

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for pair in labelled(create()):
                if self.left:
                    self.left -= 1
                    yield pair

    model = swapped()
    with refused(model, OptionError, 'yields 1 batches', '2 before'):
        sem_timm.transfer(model, batches(), evaluation=Drying())


@pytest.mark.parametrize(
    'labels, parts',
    [
        (torch.eye(16, 4, dtype=torch.long), ['shape (16, 4)', 'argmax(1)']),
        (torch.zeros(16), ['torch.float32']),
        (torch.zeros(16, dtype=torch.bool), ['torch.bool']),
        (torch.zeros(15, dtype=torch.long), ['shape (15,)', '16 images']),
        (0, ['shape ()']),
        (['cat'] * 16, ['type list']),
        ({'boxes': 1}, ['type dict']),
    ],
)
def test_labels_that_are_no_classes(labels: Any, parts: list[str]) -> None:
    model = swapped()
    with refused(model, OptionError, *parts):
        sem_timm.transfer(model, batches(), evaluation=[(batches(1)[0], labels)])


def test_labels_in_a_part_of_the_batches() -> None:
    model = swapped()
    with refused(model, OptionError, 'type NoneType'):
        sem_timm.transfer(model, batches(), evaluation=[*labelled(create()), (batches(1)[0], None)])


def test_images_of_another_size() -> None:
    model = swapped()
    with refused(model, OptionError, 'input_size=(3, 16, 16)'):
        sem_timm.transfer(model, [torch.zeros(2, 3, 16, 16)])


def test_fewer_tokens_than_slots() -> None:
    model = swapped(memory=64)
    with refused(model, OptionError, '64 slots', '34 tokens', 'more images'):
        sem_timm.transfer(model, batches(1, size=2), keys='keys')


def test_maps_of_values_need_two_images() -> None:
    model = swapped('linear', own=True)
    with refused(model, OptionError, 'shows 1 image', 'thousands are best'):
        sem_timm.transfer(model, [batches(1)[0][:1]], stages=('initialize',))


def test_a_stream_needs_a_number_of_steps_and_a_generator_runs_dry() -> None:
    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches())

    model = swapped()
    with refused(model, OptionError, 'Stream has no length', 'steps='):
        sem_timm.transfer(model, Stream())
    with refused(model, OptionError, 'passed over again', '2 of 6', 'generator'):
        sem_timm.transfer(model, iter([*batches(), *batches()]), steps=6, calibration_images=64)
    with refused(model, OptionError, 'passed over again', '4 of 4'):
        sem_timm.transfer(model, iter(batches()), steps=4)
    assert len(sem_timm.transfer(model, Stream(), steps=6)['match'].losses) == 6


def test_a_loader_that_fails_half_way() -> None:
    class Broken:
        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Iterator[Tensor]:
            yield from batches()
            raise OSError('image 65 cannot be read')

    model = swapped()
    with refused(model, OSError, 'image 65'):
        sem_timm.transfer(model, Broken(), train='module')


def test_a_learning_rate_at_which_training_diverges() -> None:
    model = swapped()
    with refused(model, ModelError, "'match'", 'blocks.0.attn', 'learning_rate'):
        sem_timm.transfer(model, batches(), optimizer='sgd', learning_rate=1e30, epochs=4, stages=('match',))


@pytest.mark.parametrize('stage', ['match', 'features', 'distill'])
def test_what_was_reached_before_a_training_diverges_is_kept(stage: str) -> None:
    model, reached = swapped(), swapped()
    sem_timm.transfer(reached, batches(), stages=('initialize',))
    rates = {f'{prefix}learning_rate': 1e30 for prefix in ('', 'base_', 'features_', 'distill_')}
    with pytest.raises(ModelError, match=rf"'{stage}'.*as it was before this stage"):
        sem_timm.transfer(model, batches(), optimizer='sgd', stages=('initialize', stage), warmup=0, **rates)
    for one, other in zip(model.state_dict().values(), reached.state_dict().values()):
        assert torch.equal(one, other)


def test_images_that_are_no_numbers_name_the_stage_and_the_layer() -> None:
    model = swapped()
    with refused(model, ModelError, "'match'", 'blocks.0.attn', 'look at the images'):
        sem_timm.transfer(model, [images * float('nan') for images in batches()], stages=('match',))


def test_a_model_without_features_cannot_match_them() -> None:
    model = swapped(model=Model(Plain()).eval(), input_size=(3, 32, 32))
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))]
    with refused(model, ModelError, 'forward_features', "stages=('initialize', 'match')"):
        sem_timm.transfer(model, images, stages=('initialize', 'features'))


@pytest.mark.parametrize(
    'options, parts',
    [
        ({'stages': ('match', 'initialize')}, ['in the order']),
        ({'stages': ('matching',)}, ["'matching' is unknown", 'match']),
        ({'stages': ()}, ['stages=()']),
        ({'keys': 'centers'}, ["keys='centers'"]),
        ({'values': 'mean'}, ["values='mean'", 'means']),
        ({'values': 'means'}, ['needs clusters']),
        ({'train': 'all'}, ["train='all'"]),
        ({'epochs': 0}, ['epochs=0']),
        ({'steps': True}, ['steps=True']),
        ({'learning_rate': -1.0}, ['learning_rate=-1.0']),
        ({'learning_rate': float('nan')}, ['learning_rate=nan']),
        ({'sharpness': ()}, ['sharpness=()']),
        ({'warmup': 1.0}, ['warmup=1.0']),
        ({'weight_decay': -0.1}, ['weight_decay=-0.1', 'at least 0']),
        ({'weight_decay': 'abc'}, ["weight_decay='abc'"]),
        ({'weight_decay': float('nan')}, ['weight_decay=nan']),
        ({'seed': 'abc'}, ["seed='abc'", 'whole number']),
        ({'seed': True}, ['seed=True']),
        ({'seed': 2**64}, ['torch.manual_seed']),
        ({'optimizer': 'adamv'}, ["optimizer='adamv' is unknown", 'adamw']),
        ({'optimizer': 3}, ['optimizer=3 is unknown']),
        ({'scheduler': 'cosin'}, ["scheduler='cosin' is unknown", 'cosine']),
        ({'scheduler': 'const'}, ["scheduler='const'", 'Close: constant']),
        ({'scheduler': 'wsd', 'steps': 1}, ["scheduler='wsd' over 1 steps", '0 < decay_epochs']),
        ({'scheduler': 'none'}, ["constant rate give 'constant'"]),
        ({'epoch': 2}, ["option 'epoch'", 'epochs']),
    ],
)
def test_options_without_a_meaning(options: dict[str, Any], parts: list[str]) -> None:
    model = swapped()
    with refused(model, OptionError, *parts):
        sem_timm.transfer(model, batches(), **options)


def test_why_timm_cannot_make_an_optimizer_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    model = swapped()
    with refused(model, OptionError, "optimizer='bnbadam': ", 'CUDA required'):
        sem_timm.transfer(model, batches(), optimizer='bnbadam')


def test_distillation_needs_a_timm_that_has_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'timm.task', None)  # as before timm 1.0.23
    model = swapped()
    with refused(model, MissingPackageError, "'timm>=1.0.23'", "stages=('initialize', 'match')"):
        sem_timm.transfer(model, batches(), stages=('match', 'distill'))


def test_distillation_needs_a_classifier_of_timm() -> None:
    model = swapped()
    del model.pretrained_cfg
    with refused(model, ModelError, 'pretrained_cfg', "stages=('initialize', 'match')"):
        sem_timm.transfer(model, batches(), stages=('distill',))
