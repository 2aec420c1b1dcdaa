"""The data sets by name: prepares them, and tells which of their splits a preset uses."""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable

import tensorflow_datasets as tfds
from etils import epath

from flaxcap.config import Config
from flaxcap.data import copies
from flaxcap.data.base import CaptionBuilder, DataError, Examples
from flaxcap.errors import nearest
from flaxcap.files import integrity
from flaxcap.runtime.cache import cache_dir

# By name: a builder's module is imported when its data set is first used.
_BUILDERS = {
    "coco_captions": "CocoCaptionsBuilder",
    "flickr8k": "Flickr8kBuilder",
    "folder": "FolderBuilder",
    "shapes": "ShapesBuilder",
}
NAMES = tuple(_BUILDERS)

PathLike = str | os.PathLike


def local_dir(data_dir: PathLike) -> epath.Path:
    """Returns the directory of the prepared data sets: `data_dir`, or the cache if `data_dir` is an object store's.

    array_record 0.8 writes to local disks only.
    """
    return epath.Path(cache_dir() if integrity.is_remote(data_dir) else data_dir).expanduser()


def prepare_for(
    config: Config, data_dir: PathLike, *, manual_dir: PathLike | None = None, max_bad_fraction: float = 0.05
) -> tfds.core.DatasetBuilder:
    """Prepares a preset's data set, see `prepare`.

    Args:
      config: the preset.
      data_dir: a directory, possibly in an object store, see `local_dir`.
      manual_dir: the directory of the user's own files.
      max_bad_fraction: the largest fraction of a split's images that may be missing.

    Returns:
      The builder of the prepared copy.

    Raises:
      DataError: see `prepare`.
    """
    options = dataclasses.asdict(config.data.shapes) if config.dataset == "shapes" else {}
    options["max_bad_fraction"] = max_bad_fraction
    return prepare(config.dataset, local_dir(data_dir), manual_dir=manual_dir, **options)


def prepare(
    dataset: str, data_dir: PathLike, *, manual_dir: PathLike | None = None, **builder_kwargs
) -> tfds.core.DatasetBuilder:
    """Prepares a data set in `data_dir/dataset`, unless a prepared copy of the same files is there.

    Without `manual_dir` the files are looked for where the copy found them. A copy of coco_captions that TFDS's own
    builder wrote below `data_dir`, as array_record, is used.

    Args:
      dataset: one of NAMES.
      data_dir: a local directory for the prepared copies; downloads go to `data_dir/downloads`.
      manual_dir: the directory of the user's own files. flickr8k and folder read the complete data set from it,
        coco_captions the files that need no download. A folder that is prepared already is found without it.
      **builder_kwargs: further arguments of the builder, such as `seed` and `num_train` of shapes.

    Returns:
      The builder of the prepared copy.

    Raises:
      DataError: the name is unknown, or data are missing or damaged. No incomplete copy is left behind.
    """
    builder_class = _builder_class(dataset)
    root = epath.Path(data_dir).expanduser()
    if dataset == "folder" and manual_dir is None:
        copy = copies.only_folder(root)
        manual_dir = copies.manual_dir_of(copy)
        if manual_dir is None:
            return copy
    make = functools.partial(builder_class, data_dir=root, manual_dir=manual_dir, **builder_kwargs)
    builder = make()
    if copies.exists(builder):
        if manual_dir is None and (found := copies.manual_dir_of(builder)):
            make.keywords["manual_dir"] = found
            builder = make()
        if copies.is_current(builder):
            return builder
    elif dataset == "coco_captions" and (found := copies.find(root / dataset, "2014/*")):
        return found[-1]
    elif builder.data_path.exists():
        raise DataError(
            f"{builder.data_dir}: found files that are not a prepared data set, expected none;"
            " delete the directory, or choose another --data_dir"
        )
    return copies.write(make, root / f".{dataset}.replaced")


def splits(config: Config) -> dict[str, str]:
    """Returns a preset's TFDS split by role: {"train": "train+restval", "val": "val", "test": "test"}.

    A role with an empty split is left out.
    """
    found = {"train": config.data.train_split, "val": config.data.val_split, "test": config.data.test_split}
    return {role: split for role, split in found.items() if split}


def examples_of(config: Config, builder: tfds.core.DatasetBuilder, role: str) -> Examples:
    """Returns the split that plays a role, "train", "val" or "test", in a preset.

    Raises:
      DataError: the preset has no split for the role, or the data set has no split of that name.
    """
    found = splits(config)
    if role not in found:
        raise DataError(f"--split={role}: expected one of {', '.join(found)}")
    return Examples(builder, found[role], f"--config.data.{role}_split")


def caption_truth(config: Config) -> Callable[[int, str], bool] | None:
    """Returns a function that tells from an image id and a caption whether the caption is true of the image.

    None for every data set except `shapes`, whose scenes are known.

    Raises:
      DataError: the name of the data set is unknown.
    """
    _builder_class(config.dataset)
    if config.dataset != "shapes":
        return None
    shapes = importlib.import_module("flaxcap.data.shapes")
    return functools.partial(shapes.is_true, seed=config.data.shapes.seed)


def _builder_class(dataset: str) -> type[CaptionBuilder]:
    if dataset not in _BUILDERS:
        raise DataError(f"dataset {dataset!r}: expected one of {', '.join(NAMES)}{nearest(dataset, list(NAMES))}")
    return getattr(importlib.import_module(f"flaxcap.data.{dataset}"), _BUILDERS[dataset])
