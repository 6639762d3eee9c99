"""What a factor of one number per channel passes, and what takes it: layers and functions by name and class."""

from __future__ import annotations

from torch import nn

from sem_timm.meta.vocabulary import Kind

PASSED_LAYERS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

# Factors of gates are not negative, and so max and relu hand them on; what is, is found out in numbers. They hand on no
# shift.
RECTIFIERS = {'relu', 'leaky_relu'}
RECTIFYING_LAYERS = (nn.ReLU, nn.LeakyReLU)

# These do where channels are on axis 1, over which nothing is pooled. A shift would be smaller at a padded border.
POOLS = {'avg_pool2d', 'max_pool2d', 'adaptive_avg_pool2d', 'interpolate'}
POOLING_LAYERS = (nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample)

MOVES = (Kind.RESHAPE, Kind.PERMUTATION, Kind.INDEX, Kind.EXPANSION)

# Functions of weights, and what people call them.
NOUNS = {
    'linear': 'linear layer',
    **dict.fromkeys(('conv1d', 'conv2d', 'conv3d'), 'convolution'),
    'batch_norm': 'batch norm',
    'instance_norm': 'instance norm',
    'group_norm': 'group norm',
    'layer_norm': 'layer norm',
    'rms_norm': 'RMS norm',
}
# Where the weight stands among their arguments; the bias follows it.
PLACES = {'batch_norm': 3, 'instance_norm': 3, 'group_norm': 2, 'layer_norm': 2, 'rms_norm': 2}
ON_LAST_AXIS = ('linear', 'layer_norm', 'rms_norm')

NORMS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), 'batch norm'),
    nn.GroupNorm: 'group norm',
    nn.LayerNorm: 'layer norm',
    nn.RMSNorm: 'RMS norm',
}
LAYERS: dict[type[nn.Module], str] = {
    nn.Linear: 'linear layer',
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), 'convolution'),
    **NORMS,
}
