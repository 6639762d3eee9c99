"""The cells of the matrix that do not apply or cannot work, and why: all of them, and only here."""

from __future__ import annotations

from dataclasses import dataclass

from sem_timm.errors import ModelError
from tests.compatibility.families import COLUMNS, OPERATIONS
from tests.compatibility.twins import UnpatchedFails


@dataclass(frozen=True)
class _Exception:
    capability: str
    columns: tuple[str, ...]
    reason: str
    operations: tuple[str, ...] = OPERATIONS

    def covers(self, capability: str, operation: str, column: str) -> bool:
        return self.capability == capability and operation in self.operations and column in self.columns


@dataclass(frozen=True)
class DoesNotApply(_Exception):
    """There is nothing to test.

    Attributes:
        lacks: The attribute that the models of these columns do not have.
    """

    lacks: str = ''


@dataclass(frozen=True)
class CannotWork(_Exception):
    """The test fails.

    Attributes:
        raises: With this error: `UnpatchedFails` where timm's own model fails as well.
    """

    raises: type[BaseException] = UnpatchedFails


_FLAT = ('vit_registers', 'deit_distilled', 'mvitv2', 'xcit')
_ONE_SIZE = ('deit_distilled', 'mvitv2', 'levit')
_NOT_AT_TOP = 'its features are not outputs of modules at the top level, which these forms take apart'
_RESHAPED = 'its forward reshapes between its modules, which these forms leave out'
_NO_SUCH_MODULE = "timm's `feature_info` of this family names modules that do not exist"


def _all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in COLUMNS if name not in names)


EXCEPTIONS: tuple[DoesNotApply | CannotWork, ...] = (
    *(
        exception
        for form in ('list', 'dict')
        for exception in (
            CannotWork(f'features_only_{form}', ('efficientnet', *_FLAT), _NOT_AT_TOP),
            CannotWork(f'features_only_{form}', ('levit',), _RESHAPED),
        )
    ),
    CannotWork('features_only_hook', ('levit',), _RESHAPED),
    *(
        CannotWork(form, ('mvitv2',), _NO_SUCH_MODULE)
        for form in ('features_only_hook', 'features_only_fx', 'create_feature_extractor')
    ),
    *(
        CannotWork(form, ('swin',), 'its windows are written into a tensor item by item, which torch.fx cannot trace')
        for form in ('features_only_fx', 'create_feature_extractor')
    ),
    DoesNotApply(
        'set_input_size',
        _all_but('vit_registers', 'deit_distilled', 'swin', 'maxvit'),
        'these models have no `set_input_size`',
        lacks='set_input_size',
    ),
    DoesNotApply(
        'dynamic_img_size', _all_but('vit_registers', 'deit_distilled', 'swin'), 'these models have no such option'
    ),
    *(
        DoesNotApply(row, _ONE_SIZE, 'these models are built for images of one size')
        for row in ('other_sizes', 'export_resolution')
    ),
    CannotWork('compile_captured', ('mvitv2',), 'it is captured anew for more than three images'),
    *(
        CannotWork(
            row,
            ('levit',),
            'in evaluation mode it keeps a tensor with a gradient, which no second graph takes',
            operations=('sem',),
        )
        for row in ('compile_captured', 'compile_inductor')
    ),
    CannotWork(
        'onnx', ('maxvit',), 'the reshape that joins its windows fixes the size of the batch in this exporter', ('sem',)
    ),
    DoesNotApply(
        'no_weight_decay',
        ('resnet', 'efficientnet', 'convnext', 'nfnet', 'repvgg', 'mobileone'),
        'these models have no `no_weight_decay`',
        lacks='no_weight_decay',
    ),
    DoesNotApply('channel_pruning', _all_but('resnet', 'efficientnet'), 'timm prunes ResNets and EfficientNets only'),
    CannotWork(
        'patched_before_reparameterization',
        ('repvgg', 'mobileone'),
        'the sum that SEM works on would be folded away: refused with the way out, which is the row above',
        raises=ModelError,
    ),
)
