"""What every data set shares: the example, the TFDS builder base class, and the messages for bad data."""

import contextlib
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

# Pictures are compressed already: compressing them again only costs time.
_WRITER_OPTIONS = "group_size:1,uncompressed"

# The features of TFDS's own coco_captions without `objects`, which captioning never reads.
FEATURES = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }
)
# Not decoded here: a broken picture is the feature extraction's to skip and count.
_DECODERS = {"image": tfds.decode.SkipDecoding()}


class DataError(UserError):
    """Bad user data; the message names the file, record and field, what was found and what was expected."""


class Example(NamedTuple):
    """An image with its captions."""

    image: bytes  # the encoded file as it was given: JPEG, PNG, ..., or whatever a broken file held
    image_id: int
    filename: str
    captions: tuple[str, ...]


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
    """Base of the data sets. A subclass has a VERSION, `_split_generators` and `_generate_examples`.

    `_split_generators(dl_manager)` returns `{split: generator of (key, features)}`, the features being those
    of `FEATURES`. Records are written in the generator's order; a split without any is left out.

    Args:
      manual_dir: the directory that holds the user's own files, where the data set takes any.
      variant: names what the data are made from, where that can vary; a part of the path of the prepared
        copy, so that each variant is prepared once and none is taken for another.
      **kwargs: for TFDS: `data_dir`, `version`.
    """

    def __init_subclass__(cls, **kwargs):
        # TFDS's global registry knows a coco_captions of its own; flaxcap.data has the registry of these.
        super().__init_subclass__(**{**kwargs, "skip_registration": True})

    def __init__(self, *, manual_dir: os.PathLike | str | None = None, variant: str | None = None, **kwargs):
        self.manual_dir = None if manual_dir is None else pathlib.Path(manual_dir).expanduser()
        # Only while TFDS chooses: it would note the first as the default of all who share this data_dir.
        self.BUILDER_CONFIGS = [] if variant is None else [tfds.core.BuilderConfig(name=variant)]
        super().__init__(**kwargs)
        self.BUILDER_CONFIGS = []

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=FEATURES)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        """Writes the splits, holding one record at a time.

        TFDS's own writer keeps a split in memory to shuffle it, from 1 GB on through TensorFlow's files.
        No order on disk is needed: batches are drawn by index.
        """
        del download_config
        if self.manual_dir is not None and not self.manual_dir.is_dir():
            raise DataError(f"--manual_dir={self.manual_dir}: found no directory of this name, expected one")
        found = [self._write_split(*item) for item in self._split_generators(dl_manager).items()]
        splits = [split for split in found if split.num_examples]
        if not splits:
            raise DataError(f"{self.name}: no image with a caption was found")
        self.info.set_splits(tfds.core.SplitDict(splits))

    def _write_split(self, split: str, examples: Iterable[tuple[int | str, dict]]) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split)
        shards = _Shards(template)
        keys = set()
        for key, example in tqdm.tqdm(examples, f"{self.name}: {split}", unit=" images", disable=None):
            if key in keys:
                raise DataError(f"{self.name}, split {split!r}: two examples have the key {key!r}")
            keys.add(key)
            shards.write(FEATURES.serialize_example(example))
        shards.close()
        return tfds.core.SplitInfo(split, shards.lengths, shards.bytes, template)

    def _log_download_bytes(self) -> None:
        """TFDS prints sizes here, and knows none of them."""
        logging.info("preparing %s in %s", self.name, self.data_dir)

    def _log_download_done(self) -> None:
        logging.info("prepared %s in %s", self.name, self.data_dir)


class _Shards:
    """Writes the records of a split to files of about SHARD_BYTES; DataError where the disk takes no more."""

    def __init__(self, template: tfds.core.ShardedFileTemplate):
        self.lengths: list[int] = []  # records of each shard
        self.bytes = 0
        self._template = template
        self._paths: list[epath.Path] = []
        self._writer: Any = None
        self._room = 0

    def write(self, record: bytes) -> None:
        if self._room < len(record):
            self._finish()
            # Their proper names say how many there are, which is known at the end.
            self._paths.append(self._template.data_dir / f"{self._template.split}.{len(self._paths)}.unfinished")
            with self._explained():
                self._writer = array_record_module.ArrayRecordWriter(str(self._paths[-1]), _WRITER_OPTIONS)
            self._room = SHARD_BYTES
            self.lengths.append(0)
        with self._explained():
            self._writer.write(record)
        self._room -= len(record)
        self.bytes += len(record)
        self.lengths[-1] += 1

    def close(self) -> None:
        self._finish()
        for index, path in enumerate(self._paths):
            path.rename(self._template.sharded_filepath(shard_index=index, num_shards=len(self._paths)))

    def _finish(self) -> None:
        if self._writer is not None:
            with self._explained():
                self._writer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # array_record has no other for a full disk
            raise DataError(f"{self._paths[-1]}: could not be written: {error}") from error


class Examples(Sequence[Example]):
    """The examples of a split, in the order on disk, read one at a time; threads may share it.

    Args:
      builder: a prepared builder, of this package or of TFDS's own coco_captions.
      split: in TFDS's notation: "train", "train+restval", "train[:100]", "val[50%:]".

    Raises DataError for a split that there is not, and where a record cannot be read.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self.name = split
        self._where = f"{builder.data_dir}, split {split!r}"
        try:
            self._source: Any = builder.as_data_source(  # its decorator hides the parameters
                split=split,  # pyright: ignore[reportCallIssue]
                file_format=FILE_FORMAT,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            )
            self._length = len(self._source)
        except (ValueError, NotImplementedError) as error:
            there = ", ".join(f"{name} ({info.num_examples} images)" for name, info in builder.info.splits.items())
            raise DataError(f"{self._where}: {error}\nSplits that are there: {there}.") from error

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
                f"{self._where}, record {index}: {error}\nThe prepared copy is damaged; delete it."
            ) from error

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self._length))
