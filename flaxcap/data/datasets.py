"""The data sets by name: prepares them, and tells which of their splits a preset uses."""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from flaxcap.config import Config
from flaxcap.data.base import FILE_FORMAT, CaptionBuilder, DataError, Examples
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


def prepare_for(config: Config, data_dir: PathLike, *, manual_dir: PathLike | None = None) -> tfds.core.DatasetBuilder:
    """Prepares a preset's data set, see `prepare`.

    Args:
      config: the preset.
      data_dir: a directory, possibly in an object store, see `local_dir`.
      manual_dir: the directory of the user's own files.

    Returns:
      The builder of the prepared copy.

    Raises:
      DataError: see `prepare`.
    """
    options = dataclasses.asdict(config.data.shapes) if config.dataset == "shapes" else {}
    return prepare(config.dataset, local_dir(data_dir), manual_dir=manual_dir, **options)


def prepare(
    dataset: str, data_dir: PathLike, *, manual_dir: PathLike | None = None, **builder_kwargs
) -> tfds.core.DatasetBuilder:
    """Prepares a data set in `data_dir/dataset`, unless a prepared copy is there.

    A copy of coco_captions that TFDS's own builder wrote below `data_dir`, as array_record, is used.

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
        return _only_folder(root)
    builder = builder_class(data_dir=root, manual_dir=manual_dir, **builder_kwargs)
    if (builder.data_path / "dataset_info.json").exists():
        return builder
    if dataset == "coco_captions" and (copies := _prepared_copies(root / dataset, "2014/*")):
        return copies[-1]
    if builder.data_path.exists():
        raise DataError(
            f"{builder.data_dir}: found files that are not a prepared data set, expected none;"
            " delete the directory, or choose another --data_dir"
        )
    builder.download_and_prepare(
        file_format=FILE_FORMAT, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return builder


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
    return Examples(builder, found[role])


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


def _only_folder(root: epath.Path) -> tfds.core.DatasetBuilder:
    """Returns the only prepared copy of a folder; DataError if there is none, or more than one."""
    copies = _prepared_copies(root / "folder", "*/*")
    if len(copies) != 1:
        listed = ", ".join(str(copy.data_dir) for copy in copies) or "none"
        raise DataError(
            f"--manual_dir: found none, expected the folder of images and captions; prepared copies: {listed}"
        )
    return copies[0]


def _prepared_copies(directory: epath.Path, pattern: str) -> list[tfds.core.DatasetBuilder]:
    """Returns the builders of the copies in array_record below `directory`, the newest version last."""
    copies = []
    for path in directory.glob(f"{pattern}/dataset_info.json"):
        copy = tfds.builder_from_directory(path.parent)
        if any(form.value == FILE_FORMAT for form in copy.info.available_file_formats()):
            copies.append(copy)
        else:
            logging.warning(
                "%s: found a copy in %s, expected %s; it is not used", path.parent, copy.info.file_format, FILE_FORMAT
            )
    return sorted(copies, key=lambda copy: copy.version)
