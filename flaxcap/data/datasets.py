"""The data sets by name: prepares one, and finds the splits that a preset uses."""

import dataclasses
import difflib
import functools
import importlib
import os
from collections.abc import Callable

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from flaxcap.config import Config, cache_dir
from flaxcap.data.base import FILE_FORMAT, CaptionBuilder, DataError

# Imported when asked for: each has needs of its own.
_BUILDERS = {
    "coco_captions": "CocoCaptionsBuilder",
    "flickr8k": "Flickr8kBuilder",
    "folder": "FolderBuilder",
    "shapes": "ShapesBuilder",
}
NAMES = tuple(_BUILDERS)

PathLike = str | os.PathLike


def prepare(
    dataset: str, data_dir: PathLike, *, manual_dir: PathLike | None = None, **builder_kwargs
) -> tfds.core.DatasetBuilder:
    """The builder of `dataset`, its data in `data_dir/dataset`, prepared unless they are there.

    Args:
      dataset: one of NAMES.
      data_dir: where prepared data are kept; downloads go to `data_dir/downloads`.
      manual_dir: the directory of the user's own files: of flickr8k and folder the whole data set, of
        coco_captions what need not be downloaded. A folder that was prepared before is found without it.
      **builder_kwargs: for the builder: of shapes `seed`, `num_train`, `num_val`, `num_test`.

    coco_captions that TFDS's own builder prepared under `data_dir` (as array_record) are used as they are.

    Raises DataError for an unknown name and for bad or missing data; nothing half-made is left behind.
    """
    builder_class = _builder_class(dataset)
    root = epath.Path(data_dir).expanduser()
    if dataset == "folder" and manual_dir is None:
        copies = _prepared(root / dataset, "*/*")
        if len(copies) != 1:
            listed = ", ".join(str(copy.data_dir) for copy in copies) or "none"
            raise DataError(f"folder: which folder is not said (--manual_dir); prepared ones: {listed}")
        return copies[0]
    builder = builder_class(data_dir=root, manual_dir=manual_dir, **builder_kwargs)
    if (builder.data_path / "dataset_info.json").exists():
        return builder
    if dataset == "coco_captions" and (copies := _prepared(root / dataset, "2014/*")):
        return copies[-1]
    if builder.data_path.exists():
        raise DataError(f"{builder.data_dir}: there, but not a prepared data set; delete it or take another data_dir")
    builder.download_and_prepare(
        file_format=FILE_FORMAT, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return builder


def prepare_for(config: Config, data_dir: PathLike, *, manual_dir: PathLike | None = None) -> tfds.core.DatasetBuilder:
    """The builder of a preset's data set, prepared.

    TFDS writes to disks alone: with a `data_dir` in an object store the data set is kept in the cache.
    """
    root = cache_dir() if "://" in str(data_dir) else data_dir
    return prepare(config.dataset, root, manual_dir=manual_dir, **builder_options(config))


def builder_options(config: Config) -> dict:
    """What the builder of a preset's data set takes beside directories."""
    return dataclasses.asdict(config.data.shapes) if config.dataset == "shapes" else {}


def splits(config: Config) -> dict[str, str]:
    """{"train": "train+restval", "val": …, "test": …}: which TFDS split plays which part."""
    found = {"train": config.data.train_split, "val": config.data.val_split, "test": config.data.test_split}
    return {role: split for role, split in found.items() if split}


def caption_truth(config: Config) -> Callable[[int, str], bool] | None:
    """Returns a function that says of an image id and a caption whether the caption is true of the image.

    None for every data set but `shapes`, whose scenes are known.
    """
    _builder_class(config.dataset)
    if config.dataset != "shapes":
        return None
    shapes = importlib.import_module("flaxcap.data.shapes")
    return functools.partial(shapes.is_true, seed=config.data.shapes.seed)


def _builder_class(dataset: str) -> type[CaptionBuilder]:
    if dataset not in _BUILDERS:
        nearest = difflib.get_close_matches(dataset, NAMES, n=1, cutoff=0)[0]
        raise DataError(f"dataset {dataset!r}: expected one of {', '.join(NAMES)}; the nearest is {nearest!r}")
    return getattr(importlib.import_module(f"flaxcap.data.{dataset}"), _BUILDERS[dataset])


def _prepared(directory: epath.Path, pattern: str) -> list[tfds.core.DatasetBuilder]:
    """Builders of the copies prepared below `directory`, the newest version last; only of array_record."""
    copies = []
    for path in directory.glob(f"{pattern}/dataset_info.json"):
        copy = tfds.builder_from_directory(path.parent)
        if any(form.value == FILE_FORMAT for form in copy.info.available_file_formats()):
            copies.append(copy)
        else:
            logging.warning("%s: prepared as %s, not as %s: not used", path.parent, copy.info.file_format, FILE_FORMAT)
    return sorted(copies, key=lambda copy: copy.version)
