"""What ``patch.json`` says, as dataclasses: written as JSON, and read back with every field checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from sem_timm.errors import PatchFileError
from sem_timm.persistence.configurations import Config, config_from_json, config_to_json
from sem_timm.persistence.fingerprint import Fingerprint, dtype_name
from sem_timm.persistence.strict_json import Field, parse

Entry = TypeVar('Entry')

FORMAT_VERSION = 1
RECORD_NAME = 'patch.json'
WEIGHTS_PATTERN = r'patch-[0-9a-f]{32}\.safetensors'

# Whose tensors a patch holds: those of the new modules, of the trained head, and changed ones of the base.
PARTS = ('new', 'head', 'base')

_DTYPES = sorted({dtype_name(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)})
_DIGEST = '[0-9a-f]{32}'
_MAX_SITES = 100_000
_MAX_AXES = 16
_MAX_SIDE = 2**14  # of an image
_MAX_WIDTH = 2**31  # of anything inside a model


@dataclass(frozen=True)
class SiteRecord:
    """One site, as far as it decides what is built there; equal if the same is built, at whatever image size.

    Attributes:
        name: Name of the module in the model.
        class_name: Its class.
        position: 'residual', 'output' or 'core'.
        attribute: Name of the new child.
        num_prefix_tokens: Leading tokens that are not image.
        num_parameters: Parameters of the new child.
        widths: Channels and heads by name.
        shape: Shape of the tensor there in the probe of the plan, for people to read.
    """

    name: str
    class_name: str
    position: str
    attribute: str
    num_prefix_tokens: int
    num_parameters: int
    widths: dict[str, int]
    shape: tuple[int, ...] = field(compare=False)


_WIDTHS = {'core': ('head_dim', 'value_dim', 'num_heads', 'head_axis')}
_INSERTED_WIDTHS = ('channels', 'channel_dim')


def site_record(site: Any, name: str | None = None) -> SiteRecord:
    """The record of a site of a plan, under the name that its module has now, if that is another."""
    if site.position == 'core':
        widths = [site.shape[-1], site.value_shape[-1], site.num_heads, site.head_axis]
    else:
        widths = [site.channels, site.channel_dim]
    named = dict(zip(_WIDTHS.get(site.position, _INSERTED_WIDTHS), widths))
    where = (site.name if name is None else name, site.class_name, site.position, site.attribute)
    return SiteRecord(*where, site.num_prefix_tokens, site.num_parameters, named, tuple(site.shape))


@dataclass(frozen=True)
class Step:
    """One operation with its sites; a model that was patched several times has several.

    Attributes:
        config: The configuration of the operation.
        input_size: Shape (C, H, W) of the plan's probe.
        sites: The sites.
    """

    config: Config
    input_size: tuple[int, ...]
    sites: tuple[SiteRecord, ...]


@dataclass(frozen=True)
class TensorRecord:
    """What is said of one tensor of the weights: its part, type and shape."""

    part: str
    dtype: str
    shape: tuple[int, ...]


def tensor_record(part: str, tensor: torch.Tensor) -> TensorRecord:
    """The record of a tensor."""
    return TensorRecord(part, dtype_name(tensor.dtype), tuple(tensor.shape))


@dataclass(frozen=True)
class Base:
    """The model under the patch.

    Attributes:
        architecture: timm's name of it, where it has one.
        tag: timm's name of the weights of its configuration, where there is one. A model that was made without
            weights, or trained since, has it too.
        class_name: Its class.
    """

    architecture: str | None
    tag: str | None
    class_name: str

    def __str__(self) -> str:
        name = self.architecture or self.class_name
        return f'{name}, of the tag {self.tag!r} if its weights were loaded' if self.tag else name


@dataclass(frozen=True)
class WeightsFile:
    """The file of the tensors: named by its contents, so that an interrupted save cannot leave it half replaced."""

    file: str
    size: int
    digest: str


@dataclass(frozen=True)
class PatchRecord:
    """All that ``patch.json`` says.

    Attributes:
        versions: Versions of sem_timm, timm and torch that wrote it.
        base: The model under the patch.
        steps: The operations.
        tensors: The tensors of the weights, by their names in the patched model.
        fingerprints: What the tensors of the base that are not part of the patch looked like.
        weights: The file of the tensors.
    """

    versions: dict[str, str]
    base: Base
    steps: tuple[Step, ...]
    tensors: dict[str, TensorRecord]
    fingerprints: dict[str, Fingerprint]
    weights: WeightsFile

    def to_json(self) -> str:
        """The text of ``patch.json``."""
        data = {
            'format_version': FORMAT_VERSION,
            'versions': self.versions,
            'base': asdict(self.base),
            'operations': [
                {
                    **config_to_json(step.config),
                    'input_size': step.input_size,
                    'sites': [asdict(site) for site in step.sites],
                }
                for step in self.steps
            ],
            'weights': asdict(self.weights),
            'tensors': {name: asdict(tensor) for name, tensor in self.tensors.items()},
            'fingerprints': {name: asdict(print_) for name, print_ in self.fingerprints.items()},
        }
        text = json.dumps(data, indent=1, allow_nan=False) + '\n'
        # Lists of numbers on one line; a text has no line breaks of its own, so none is changed.
        return re.sub(r'\[\n[\d\s,-]+\]', lambda found: ' '.join(found[0].split()), text)


_FIELDS = ('format_version', 'versions', 'base', 'operations', 'weights', 'tensors', 'fingerprints')
_VERSIONS = ('sem_timm', 'timm', 'torch')


def read_record(folder: Path) -> PatchRecord:
    """Reads and checks the ``patch.json`` of a folder.

    Raises:
        PatchFileError: If it is not there, or anything in it is not as it should be.
    """
    file = folder / RECORD_NAME
    if not file.is_file():
        if folder.is_file():
            raise PatchFileError(
                f'{folder} is a file; give the folder that it is in: load_patch(model, {str(folder.parent)!r}).'
            )
        found = sorted(entry.name for entry in folder.iterdir())[:5] if folder.is_dir() else None
        what = 'there is no such folder' if found is None else f'the folder holds {", ".join(found) or "nothing"}'
        raise PatchFileError(f'{file} is no file: {what}. save_patch(model, folder) writes one.')
    whole = parse(file)
    _check_version(whole)
    top = whole.fields(_FIELDS)
    record = PatchRecord(
        versions={name: version.text() for name, version in top['versions'].fields(_VERSIONS).items()},
        base=_base(top['base']),
        steps=tuple(_step(item) for item in top['operations'].items(_MAX_SITES)),
        tensors=_mapped(_tensor, top['tensors']),
        fingerprints=_mapped(_fingerprint, top['fingerprints']),
        weights=_weights(top['weights']),
    )
    if not record.steps:
        raise top['operations'].error('is empty; a patch has an operation.')
    return record


def _mapped(read: Callable[[Field], Entry], found: Field) -> dict[str, Entry]:
    return {name: read(entry) for name, entry in found.entries().items()}


def _check_version(whole: Field) -> None:
    """Looks at the version first: what a newer one may add is no error of the file."""
    found = whole.entries()
    if 'format_version' not in found:
        raise whole.error("has no field 'format_version'; it was not written by save_patch.")
    version = found['format_version'].integer(1)
    if version > FORMAT_VERSION:
        raise found['format_version'].error(
            f'{version} is newer than {FORMAT_VERSION}, the newest that this sem_timm reads; '
            'pip install --upgrade sem_timm.'
        )


def _base(found: Field) -> Base:
    base = found.fields(('architecture', 'tag', 'class_name'))
    return Base(base['architecture'].optional(Field.text), base['tag'].optional(Field.text), base['class_name'].text())


def _step(found: Field) -> Step:
    step = found.fields(('operation', 'options', 'input_size', 'sites'))
    input_size = step['input_size'].integers(4, 1, _MAX_SIDE)
    sites = tuple(_site(item) for item in step['sites'].items(_MAX_SITES))
    if not sites:
        raise step['sites'].error('is empty; an operation has a site.')
    return Step(config_from_json(found), input_size, sites)


def _site(found: Field) -> SiteRecord:
    site = found.fields(SiteRecord.__dataclass_fields__)
    position = site['position'].text(('residual', 'output', 'core'))
    widths = site['widths'].fields(_WIDTHS.get(position, _INSERTED_WIDTHS))
    return SiteRecord(
        name=site['name'].text(),
        class_name=site['class_name'].text(),
        position=position,
        attribute=site['attribute'].text(),
        num_prefix_tokens=site['num_prefix_tokens'].integer(0, _MAX_WIDTH),
        num_parameters=site['num_parameters'].integer(0),
        widths={name: width.integer(-_MAX_WIDTH, _MAX_WIDTH) for name, width in widths.items()},
        shape=site['shape'].integers(_MAX_AXES, 0, _MAX_WIDTH),
    )


def _tensor(found: Field) -> TensorRecord:
    tensor = found.fields(TensorRecord.__dataclass_fields__)
    shape = tensor['shape'].integers(_MAX_AXES, 0, _MAX_WIDTH)
    return TensorRecord(tensor['part'].text(PARTS), tensor['dtype'].text(_DTYPES), shape)


def _fingerprint(found: Field) -> Fingerprint:
    entry = found.fields(Fingerprint.__dataclass_fields__)
    dtype = entry['dtype'].text(_DTYPES)
    digests = {name: digest.matching(_DIGEST) for name, digest in entry['digests'].entries().items()}
    if dtype not in digests:
        raise entry['digests'].error(f'lacks {dtype!r}, the type of the tensor.')
    return Fingerprint(dtype, entry['shape'].integers(_MAX_AXES, 0, _MAX_WIDTH), digests)


def _weights(found: Field) -> WeightsFile:
    weights = found.fields(WeightsFile.__dataclass_fields__)
    file, size, digest = weights['file'], weights['size'], weights['digest']
    return WeightsFile(file.matching(WEIGHTS_PATTERN), size.integer(1), digest.matching(_DIGEST))
