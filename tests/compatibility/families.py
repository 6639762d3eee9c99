"""The columns of the matrix: small members of families that differ in layout and in the form of their attention."""

from __future__ import annotations

from dataclasses import dataclass

from timm.models import byobnet

from tests.families import SMALL_MVITV2, SMALL_SWIN, Family


@dataclass(frozen=True)
class Column(Family):
    """A family of the matrix.

    Attributes:
        layout: How features lie where SEM acts: 'NCHW', 'NHWC', 'NLC' or several of them.
        attention: The form of the self-attention, if there is any.
        swappable: Whether External Attention can take its place.
    """

    layout: str = 'NCHW'
    attention: str = ''
    swappable: bool = False


_REPVGG = byobnet._rep_vgg_bcfg(d=(1, 2, 1, 1), wf=(0.25, 0.25, 0.25, 0.25))
_MOBILEONE = byobnet._mobileone_bcfg(d=(1, 2, 1, 1), wf=(0.25, 0.25, 0.25, 0.25), num_conv_branches=2)

COLUMNS = {
    'resnet': Column('test_resnet'),
    'efficientnet': Column('test_efficientnet'),
    'convnext': Column('test_convnext'),
    'nfnet': Column('test_nfnet'),
    'repvgg': Column('repvgg_a0', options={'blocks': _REPVGG, 'stem_chs': 16}),
    'mobileone': Column('mobileone_s0', options={'blocks': _MOBILEONE, 'stem_chs': 16}),
    'fastvit': Column(
        'fastvit_sa12',
        options={'embed_dims': (16, 32, 64, 128), 'layers': (1, 1, 1, 1)},
        attention='over all positions, after stages of convolutions',
        swappable=True,
    ),
    'vit_registers': Column(
        'test_vit',
        options={'reg_tokens': 4, 'img_size': 64, 'dynamic_img_size': True},
        layout='NLC',
        attention='over all tokens, with class and register tokens',
        swappable=True,
    ),
    'deit_distilled': Column(
        'deit_tiny_distilled_patch16_224',
        options={'img_size': 64, 'embed_dim': 64, 'depth': 2, 'num_heads': 2},
        other_size=None,
        layout='NLC',
        attention='over all tokens, with class and distillation tokens and two heads',
        swappable=True,
    ),
    'swin': Column(
        'swin_tiny_patch4_window7_224',
        options=SMALL_SWIN,
        layout='NLC',
        attention='in shifted windows, with a table of position biases',
        swappable=True,
    ),
    'maxvit': Column(
        'test_maxvit',
        options={'img_size': 64},
        other_size=None,
        layout='NCHW, NHWC',
        attention='in windows and in grids',
        swappable=True,
    ),
    'mvitv2': Column(
        'mvitv2_tiny',
        options=SMALL_MVITV2,
        other_size=None,
        layout='NLC',
        attention='over pooled keys, with decomposed positions',
        swappable=True,
    ),
    'levit': Column(
        'levit_128s',
        size=128,
        options={'img_size': 128, 'embed_dim': (32, 48, 64), 'depth': (1, 1, 1)},
        other_size=None,
        layout='NLC',
        attention='over all positions, batch-normalised, with biases kept in a cache',
        swappable=True,
    ),
    'xcit': Column(
        'xcit_nano_12_p16_224',
        options={'depth': 2, 'embed_dim': 64},
        layout='NLC',
        attention='over channels, which no core takes the place of; `eamlp` replaces the whole module',
    ),
}

OPERATIONS = ('sem', 'external')
SWAPPABLE = tuple(name for name, column in COLUMNS.items() if column.swappable)


def columns_of(operation: str) -> tuple[str, ...]:
    """The columns that an operation has something to do in."""
    return tuple(COLUMNS) if operation == 'sem' else SWAPPABLE
