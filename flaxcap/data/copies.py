"""Prepared copies of data sets on disk: written once, and again when the user's files have changed."""

import contextlib
import gc
import os
import pathlib
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from flaxcap.data import sources
from flaxcap.data.base import FILE_FORMAT, CaptionBuilder, DataError
from flaxcap.errors import listed


def exists(builder: tfds.core.DatasetBuilder) -> bool:
    """Returns True if a complete copy is on disk."""
    return (builder.data_path / "dataset_info.json").exists()


def find(directory: epath.Path, pattern: str) -> list[tfds.core.DatasetBuilder]:
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


def fingerprint(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the SHA-256 (hex) of the user's files that a copy was read from; "" if it was read from none."""
    found = sources.read(builder.data_path)
    return found.fingerprint if found is not None else ""


def manual_dir_of(builder: tfds.core.DatasetBuilder) -> str | None:
    """Returns the directory of the user's files that a copy was read from; None: there was none, or it is gone."""
    found = sources.read(builder.data_path)
    return found.root if found is not None and os.path.isdir(found.root) else None


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses garbage collection. Of 100,000 files it takes as long as all else (0.7 s, Python 3.11)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def is_current(builder: CaptionBuilder) -> bool:
    """Returns True if the files in `manual_dir` are those that the copy was read from. Prints which have changed."""
    if builder.manual_dir is None:
        return True
    known = sources.read(builder.data_path)
    if known is None:
        print(f"{builder.data_dir}: found no {sources.SOURCES}, which names the files; the data set is read again")
        return False
    names = dict.fromkeys([*known.files, *_names(builder, builder.index())])
    found = sources.look(builder.manual_dir, names, known)
    if all(source.size < 0 for source in found.files.values()):
        return True  # the files are gone; the copy needs none
    if changed := sources.changed(known, found):
        print(f"{builder.name}: {len(changed)} files have changed ({listed(changed)}); the data set is read again")
        return False
    if found != known:  # copied or touched
        sources.write(builder.data_path, found)
    return True


def write(make: Callable[[], CaptionBuilder], spare: epath.Path) -> CaptionBuilder:
    """Writes a copy and returns its builder. An existing copy comes back if the new one cannot be written.

    Args:
      make: makes the builder.
      spare: where the existing copy is kept meanwhile.

    Raises:
      DataError: data are missing or damaged.
    """
    if spare.exists():  # of a process that was killed
        spare.rmtree()
    builder = make()
    if builder.data_path.exists():
        builder.data_path.rename(spare)
        builder = make()  # TFDS 4.9 cannot write with a builder that has read a copy
    try:
        # Before the files are read: a file that changes meanwhile is noticed next time.
        found = sources.look(builder.manual_dir, _names(builder, builder.files())) if builder.manual_dir else None
        builder.download_and_prepare(
            file_format=FILE_FORMAT, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
        if found is not None:
            sources.write(builder.data_path, found)
    except BaseException:
        if spare.exists() and not builder.data_path.exists():
            spare.rename(builder.data_path)
        raise
    if spare.exists():
        spare.rmtree()
    return builder


def only_folder(root: epath.Path) -> tfds.core.DatasetBuilder:
    """Returns the only prepared copy of a folder.

    Raises:
      DataError: there is none, or more than one.
    """
    copies = find(root / "folder", "*/*")
    if len(copies) != 1:
        listed = ", ".join(str(copy.data_dir) for copy in copies) or "none"
        raise DataError(
            f"--manual_dir: found none, expected the folder of images and captions; prepared copies: {listed}"
        )
    return copies[0]


def _names(builder: CaptionBuilder, files: list[pathlib.Path]) -> list[str]:
    """Returns the names of files below `manual_dir`."""
    start = f"{builder.manual_dir}{os.sep}"  # `relative_to` takes 5 µs a file (Python 3.11)
    return [str(file).removeprefix(start) for file in files]
