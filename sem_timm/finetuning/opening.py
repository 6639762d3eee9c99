"""One split of named data, opened by timm's factory; what goes wrong there is told with what to do about it."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from sem_timm.errors import MissingPackageError, OptionError, closest
from sem_timm.finetuning.errors import DataError, first_sentence
from sem_timm.finetuning.options import BUILT_IN, FASHION, FinetuneOptions

# Names of timm's factory begin so, with the packages that each kind needs; anything else is a folder or file.
_PACKAGES: dict[str, tuple[str, ...]] = {
    'torch': (),
    'hfds': ('datasets',),
    'hfids': ('datasets',),
    'tfds': ('tensorflow', 'tensorflow_datasets'),
    'wds': ('webdataset',),
}
_TORCHVISION = (
    *('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'),
    *('imagenet', 'places365', 'inaturalist', 'image_folder'),
)
_NOT_FETCHED = ('imagenet', 'image_folder')

# Splits that nobody has asked for by name: a folder without them is taken whole, or in two parts.
_ANY_SPLIT = (FinetuneOptions.train_split, FinetuneOptions.validation_split)


def open_split(options: FinetuneOptions, split: str, part_size: int) -> Any:
    """Opens one split of the data of a run.

    Args:
        options: Those of the run.
        split: Name of the split.
        part_size: Images that a process computes at a time, which streams want to know.

    Raises:
        DataError: If there is no such data or split, or it is damaged.
        OptionError: If it is not said where the data is.
        MissingPackageError: If it needs a package that is not installed.
    """
    kind = options.data.partition('/')[0].lower() if '/' in options.data else ''
    kind = kind if kind in _PACKAGES else ''
    name, root = _name_and_root(options, kind)
    try:
        for package in _PACKAGES.get(kind, ()):  # timm would print, to the standard output, that it is missing
            import_module(package)
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            is_training=split == options.train_split,
            download=options.download,
            batch_size=part_size,
            seed=options.seed,
        )
    except ImportError as error:
        package = (error.name or str(error)).replace('_', '-')
        raise MissingPackageError(
            f'data {options.data!r} needs a package that is not installed: {error}. Do: pip install {package}'
        ) from error
    except Exception as error:  # each of the libraries that open data has its own kinds
        what = f'split {split!r} of data {options.data!r}'
        raise DataError(f'cannot open {what}: {first_sentence(error)}. {_advice(options, kind, error)}') from error
    if kind == 'wds' and root is not None:
        _check_shards(options, root, dataset.reader.split_info.filenames)
    found = root_of(dataset)
    if found is not None and found == Path(root or '') and found.is_dir() and split not in _ANY_SPLIT:
        raise DataError(f'{found} has no folder for split {split!r}; there is {folders_in(found)}.')
    return dataset


def root_of(dataset: Any) -> Path | None:
    """The folder or file of images that a dataset reads, where it is one."""
    holder = dataset if type(dataset) is ImageFolder else getattr(dataset, 'reader', None)
    root = getattr(holder, 'root', None)
    return None if root is None else Path(root)


def folders_in(root: Path) -> str:
    """The folders in another one, for messages."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return ', '.join(names[:5] + ['...'] * (len(names) > 5)) or 'none'


def _name_and_root(options: FinetuneOptions, kind: str) -> tuple[str, str | None]:
    """The arguments of timm's factory."""
    name, root = options.data, options.data_root
    if not kind:
        _check_path(name)
        return '', name
    if kind == 'torch' and root is None:
        raise OptionError(f'data {name!r} needs --data-root, the folder it is in, or goes to with --download.')
    if kind == 'wds' and root is None:
        root = name.partition('/')[2]
        if not Path(root).is_dir():
            raise DataError(
                f'data {name!r}: there is no folder {root!r} here. Type wds/ and then the folder of the shards and '
                'their _info.json; or give it, or its address, as --data-root.'
            )
    return name, root


def _check_path(name: str) -> None:
    path = Path(name)
    if not name or not path.exists():
        raise DataError(
            f'data {name!r} is no file or folder here. Give a folder with one folder of images per class, a tar, '
            f"a name such as torch/cifar10 or hfds/beans (with --data-root), '{BUILT_IN}' or '{FASHION}'."
        )
    if path.is_file() and path.suffix != '.tar':
        raise DataError(
            f'data {name!r} is a file, and no .tar. Give a folder with one folder of images per class, or a tar of '
            'such folders that is not compressed; unpack others first.'
        )


def _check_shards(options: FinetuneOptions, root: str, names: Sequence[str]) -> None:
    """Raises DataError for shards that are not there; reading would try for ever."""
    missing = [name for name in names if Path(root).is_dir() and not (Path(root) / name).exists()]
    if missing or not names:
        raise DataError(
            f'data {options.data!r}: {len(missing)} of {len(names)} shards are not in {root}, such as '
            f'{", ".join(missing[:1]) or "any"}.'
        )


def _advice(options: FinetuneOptions, kind: str, error: Exception) -> str:
    """What to do about data that cannot be opened."""
    if isinstance(error, tarfile.TarError):
        return 'The file is cut off, damaged or no tar. Make it anew from a folder: tar -cf NAME.tar -C FOLDER .'
    if kind == 'torch':
        name = options.data.rsplit('/', 1)[-1].lower()
        if name not in _TORCHVISION:
            return closest(name, _TORCHVISION)
        fetch = '' if options.download or name in _NOT_FETCHED else 'Fetch it with --download; or '
        put = f'{fetch}put its files into --data-root {options.data_root}, where torchvision looks for them.'
        return put[0].upper() + put[1:]
    if kind in ('hfds', 'hfids'):
        if 'length is unknown' in str(error):
            return f'With --download it is prepared on this machine and counted; or take hfds/ in place of {kind}/.'
        return (
            'Name a data set of the Hugging Face hub and a split that it has; where there is no network, one that is '
            f'in a folder here: {kind}//path/to/folder.'
        )
    if kind == 'wds':
        return (
            'Name splits of its _info.json with --train-split and --validation-split, or shards with the number of '
            "their images: --train-split 'train-{000..009}.tar|10000'."
        )
    if kind == 'tfds':
        return 'Name a data set of TensorFlow and a split that it has, with --data-root and perhaps --download.'
    return 'It should hold one folder of images, .png or .jpg, for each class, or such folders in a folder per split.'
