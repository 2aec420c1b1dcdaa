"""Base of the data sets: the example, the TFDS builder, and access to prepared examples."""

import contextlib
import hashlib
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from google.protobuf.message import DecodeError

from flaxcap.errors import UserError

FILE_FORMAT = "array_record"
SHARD_BYTES = 256 << 20

# One record a group: each can be read alone. Uncompressed: image files are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"

# The features of TFDS's own coco_captions without `objects`, so that TFDS's copies can be read too.
FEATURES = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }
)
# Image files stay encoded: extraction decodes them, and skips and counts the damaged ones.
_DECODERS = {"image": tfds.decode.SkipDecoding()}


class DataError(UserError):
    """Bad user data. The message names the file, record and field, what was found and what was expected."""


class Example(NamedTuple):
    """An image with its captions."""

    image: bytes  # the file as the user supplied it: JPEG, PNG, …, or damaged; b"" if it was missing
    image_id: int
    filename: str
    captions: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The first 32 digits of the SHA-256 (hex) of the image file."""
        return hashlib.sha256(self.image).hexdigest()[:32]


def example(
    image: bytes, image_id: int, filename: str, captions: Iterable[tuple[int, str]]
) -> tuple[int, dict[str, Any]]:
    """Returns an image with its captions as TFDS takes it: the key and the values of `FEATURES`.

    Args:
      image: the encoded file, stored as it is.
      image_id: unique in the data set.
      filename: the file's name, or its path below the user's folder.
      captions: (id, text) of each caption.
    """
    return image_id, {
        "image": image,
        "image/filename": filename,
        "image/id": image_id,
        "captions": [{"id": number, "text": text} for number, text in captions],
    }


class CaptionBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the data sets. A subclass has a `name`, a `VERSION`, `_split_generators` and `_generate_examples`.

    `_split_generators(dl_manager)` returns a generator of `example(...)` for each split's name. Records are
    written in the generator's order. A split without examples is left out.

    Args:
      manual_dir: the directory of the user's own files, for the data sets that read any.
      variant: names the source of the data, if a data set has several. It is part of the prepared copy's path,
        so that each variant has its own copy.
      max_bad_fraction: the largest fraction of a split's images that may be missing.
      **kwargs: for TFDS: `data_dir`, `version`.
    """

    def __init_subclass__(cls, **kwargs):
        # TFDS's global registry already has a coco_captions; `data.datasets` has the registry of these builders.
        super().__init_subclass__(**{**kwargs, "skip_registration": True})

    def __init__(
        self,
        *,
        manual_dir: os.PathLike | str | None = None,
        variant: str | None = None,
        max_bad_fraction: float = 0.05,
        **kwargs,
    ):
        self.max_bad_fraction = max_bad_fraction
        self.manual_dir = None if manual_dir is None else pathlib.Path(manual_dir).expanduser()
        # Emptied again below: TFDS 4.9 would record the first one as the default config of the shared data_dir.
        self.BUILDER_CONFIGS = [] if variant is None else [tfds.core.BuilderConfig(name=variant)]
        super().__init__(**kwargs)
        self.BUILDER_CONFIGS = []

    def files(self) -> list[pathlib.Path]:
        """Returns every file below `manual_dir` that the data set reads, in a fixed order, also if it is missing."""
        return []

    def index(self) -> list[pathlib.Path]:
        """Returns those of `files` that name the others: files of captions and splits."""
        return self.files()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=FEATURES)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        """Writes the splits with one record in memory at a time.

        TFDS 4.9's own writer shuffles: it keeps a split in memory, and from 1 GB on needs TensorFlow.
        Batches are drawn by index, so records need no shuffling.
        """
        del download_config
        if self.manual_dir is not None and not self.manual_dir.is_dir():
            raise DataError(f"--manual_dir={self.manual_dir}: found no such directory, expected one")
        written = [self._write_split(*item) for item in self._split_generators(dl_manager).items()]
        splits = [split for split in written if split.num_examples]
        if not splits:
            raise DataError(f"{self.name}: found no image with a caption, expected at least one")
        self.info.set_splits(tfds.core.SplitDict(splits))

    def _write_split(self, split: str, examples: Iterable[tuple[int | str, dict]]) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split)
        shards = _Shards(template)
        keys = set()
        for key, features in tqdm.tqdm(examples, f"{self.name}: {split}", unit=" images", disable=None):
            if key in keys:
                raise DataError(f"{self.name}, split {split!r}: found two examples with the key {key!r}, expected one")
            keys.add(key)
            shards.write(FEATURES.serialize_example(features))
        shards.close()
        return tfds.core.SplitInfo(split, shards.lengths, shards.bytes, template)

    def _log_download_bytes(self) -> None:
        """Replaces TFDS's message about sizes, which are not known."""
        logging.info("preparing %s in %s", self.name, self.data_dir)

    def _log_download_done(self) -> None:
        logging.info("prepared %s in %s", self.name, self.data_dir)


class _Shards:
    """Writes the records of a split to shards of about SHARD_BYTES; DataError if the disk is full."""

    def __init__(self, template: tfds.core.ShardedFileTemplate):
        self.lengths: list[int] = []  # records of each shard
        self.bytes = 0
        self._template = template
        self._paths: list[epath.Path] = []
        self._writer: Any = None
        self._left = 0

    def write(self, record: bytes) -> None:
        if self._left < len(record):
            self._finish()
            # `close` renames the shards: their final names contain the number of shards.
            self._paths.append(self._template.data_dir / f"{self._template.split}.{len(self._paths)}.unfinished")
            with self._disk_errors():
                self._writer = array_record_module.ArrayRecordWriter(str(self._paths[-1]), _WRITER_OPTIONS)
            self._left = SHARD_BYTES
            self.lengths.append(0)
        with self._disk_errors():
            self._writer.write(record)
        self._left -= len(record)
        self.bytes += len(record)
        self.lengths[-1] += 1

    def close(self) -> None:
        self._finish()
        for index, path in enumerate(self._paths):
            path.rename(self._template.sharded_filepath(shard_index=index, num_shards=len(self._paths)))

    def _finish(self) -> None:
        if self._writer is not None:
            with self._disk_errors():
                self._writer.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # array_record 0.8 raises it for a full disk
            raise DataError(f"{self._paths[-1]}: cannot be written: {error}") from error


class Examples(Sequence[Example]):
    """The examples of a prepared split, read from disk one at a time, in the order on disk. Thread-safe.

    Args:
      builder: the builder of a prepared copy, of this package or of TFDS's own coco_captions.
      split: in TFDS's notation: "train", "train+restval", "train[:100]", "val[50%:]".
      flag: the flag that sets the split, for messages.

    Raises:
      DataError: the split does not exist, or a record cannot be read.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, flag: str = ""):
        self.name = split
        self._where = f"{builder.data_dir}, split {split!r}"
        try:
            self._source: Any = builder.as_data_source(  # TFDS 4.9's decorator hides the parameters from pyright
                split=split,  # pyright: ignore[reportCallIssue]
                file_format=FILE_FORMAT,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            )
            self._length = len(self._source)
        except (ValueError, NotImplementedError) as error:
            existing = ", ".join(f"{name} ({info.num_examples} images)" for name, info in builder.info.splits.items())
            setting = f"{flag}={split}: " if flag else ""
            remedy = f" Set {flag} to one of these, or to a part such as train[95%:]." if flag else ""
            # TFDS lists its splits again for an unknown one, and says something of its own for a damaged notation.
            reason = str(error).partition("\n")[0]
            reason = "" if reason.startswith("Unknown split") else f" ({reason})"
            raise DataError(
                f"{setting}{self._where}: found no such split{reason}. Existing splits: {existing}.{remedy}"
            ) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Example:
        index = range(self._length)[operator.index(index)]
        try:
            fields: Any = FEATURES.deserialize_example_np(self._source[index], decoders=_DECODERS)
            return Example(
                image=fields["image"],
                image_id=int(fields["image/id"]),
                filename=fields["image/filename"].decode(),
                captions=tuple(text.decode() for text in fields["captions"]["text"]),
            )
        except (RuntimeError, KeyError, ValueError, DecodeError) as error:
            raise DataError(
                f"{self._where}, record {index}: {error}\nThe prepared copy is damaged; delete it and prepare it again."
            ) from error

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self._length))
