"""One split of a store on disk: captions, and features in shards.

SPLIT/captions.jsonl        one line for each row of the features: an image and its captions
      features/             [N, P, F] in TensorStore's zarr3 format, one file for each shard
      shards/00000.json     the record of shard 0, written when the shard is complete
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from flaxcap.errors import UserError
from flaxcap.features import zarr
from flaxcap.files import integrity
from flaxcap.files.integrity import Checksum, DamagedError, Progress

CAPTIONS, ARRAY = "captions.jsonl", "features/zarr.json"
WRITTEN_ONCE = (CAPTIONS, ARRAY)  # a split's files whose checksums are in the manifest
_REMEDY = "`flaxcap prepare` writes it again"


class StoreError(UserError):
    """A store that is missing, unfinished, damaged, or made of other data than expected."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An image of a split, without its pixels."""

    image_id: int
    filename: str
    captions: tuple[str, ...]
    digest: str = ""  # of the image file, see `Example.digest`; "": not known


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image without features."""

    row: int
    filename: str
    reason: str


class ShardRecord(NamedTuple):
    """The contents of a complete shard."""

    skipped: list[Skipped]
    file: Checksum | None  # None: all images were skipped, so TensorStore wrote no file


class Split:
    """The captions and features of one split.

    Args:
      path: the directory.
      images: the number of rows, N.
      shard_rows: rows of a shard; the last one may have fewer.
      checksums: those of the files WRITTEN_ONCE, which are checked when the files are read. Without them nothing is
        checked, as for a split that is being written.
    """

    def __init__(self, path: epath.Path, images: int, shard_rows: int, checksums: Mapping[str, Checksum] | None = None):
        self.path, self.images, self.shard_rows = path, images, shard_rows
        self._checksums = checksums or {}

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The images and their captions.

        Raises:
          StoreError: the file is missing or damaged, or has another number of lines than the split has images.
        """
        file = self.path / CAPTIONS
        try:
            data = file.read_bytes()
            if CAPTIONS in self._checksums:
                integrity.check_bytes(data, self._checksums[CAPTIONS])
            lines = data.decode().splitlines()
        except DamagedError as e:
            raise StoreError(f"{file}: {e}; {_REMEDY}") from e
        except (OSError, ValueError) as e:
            raise StoreError(f"{file}: cannot be read ({e})") from e
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                r = json.loads(line)
                rows.append(Row(r["id"], r["file"], tuple(r["captions"]), r["image"]))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise StoreError(f"{file}: line {number} cannot be read ({e!r})") from e
        if len(rows) != self.images:
            raise StoreError(f"{file}: found {len(rows)} images, expected {self.images}")
        return rows

    # Shards

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.shard_rows)

    def shard(self, number: int) -> range:
        """Returns the rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.images))

    def unfinished(self) -> list[int]:
        """Returns the numbers of the shards that are not complete."""
        folder = self.path / "shards"
        names = {f.name for f in folder.iterdir()} if folder.exists() else set()
        return [n for n in range(self.num_shards) if self.record_file(n).name not in names]

    def finished(self) -> list[int]:
        """Returns the numbers of the complete shards."""
        return sorted(set(range(self.num_shards)) - set(self.unfinished()))

    def record_file(self, number: int) -> epath.Path:
        return self.path / "shards" / f"{number:05d}.json"

    def shard_file(self, number: int) -> epath.Path:
        return self.path / "features" / "c" / str(number) / "0" / "0"

    def mark_finished(self, number: int, skipped: Iterable[Skipped]) -> None:
        """Writes the record of a shard whose features are on disk.

        Raises:
          WriteError: the record cannot be written.
        """
        file = self.shard_file(number)
        checksum = Checksum.of_file(file)._asdict() if file.exists() else None
        record = {"skipped": [dataclasses.asdict(s) for s in skipped], "file": checksum}
        integrity.write_atomically(self.record_file(number), integrity.seal(record))

    def mark_unfinished(self, number: int) -> None:
        """Deletes the record of a shard, so that `flaxcap prepare` computes the shard again.

        Raises:
          StoreError: the record cannot be deleted.
        """
        try:
            self.record_file(number).unlink(missing_ok=True)
        except OSError as e:
            raise StoreError(f"{self.record_file(number)}: cannot be deleted ({e.strerror or e})") from e

    def record(self, number: int) -> ShardRecord:
        """Returns the record of a complete shard.

        Raises:
          StoreError: the record is missing or damaged.
        """
        file = self.record_file(number)
        try:
            found = integrity.unseal(file.read_bytes())
            checksum = found["file"] and Checksum(int(found["file"]["size"]), str(found["file"]["sha256"]))
            return ShardRecord([Skipped(**s) for s in found["skipped"]], checksum)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise StoreError(f"{file}: cannot be read ({e}); `flaxcap prepare` computes this shard again") from e

    def check_shard(self, number: int, progress: Progress | None = None) -> None:
        """Compares the file of a complete shard with its record.

        Args:
          number: the shard.
          progress: is called for every block that is read. With None nothing is read, and only the size is compared.

        Raises:
          StoreError: the record is missing or damaged.
          DamagedError: the file is missing or damaged.
        """
        record, file = self.record(number), self.shard_file(number)
        if record.file is None:
            if len(record.skipped) < len(self.shard(number)):
                raise DamagedError("missing")
        elif progress is not None:
            integrity.check(file, record.file, progress)
        else:
            integrity.check_size(file, record.file)

    def skipped(self) -> list[Skipped]:
        """Returns the images without features in the complete shards."""
        return [s for number in self.finished() for s in self.record(number).skipped]

    def present(self) -> list[int]:
        """Returns the rows that have features."""
        missing = {s.row for s in self.skipped()}
        return [row for row in range(self.images) if row not in missing]

    # Features

    @functools.cached_property
    def array(self) -> ts.TensorStore:
        """The features [N, P, F], opened for reading.

        Raises:
          StoreError: the array's description is missing or damaged.
        """
        try:
            if ARRAY in self._checksums:
                integrity.check(self.path / ARRAY, self._checksums[ARRAY])
            return zarr.open_to_read(self.path / "features")
        except DamagedError as e:
            raise StoreError(f"{self.path / ARRAY}: {e}; {_REMEDY}") from e
        except (ValueError, KeyError) as e:
            raise StoreError(f"{self.path / 'features'}: cannot be opened ({zarr.reason(e)})") from e

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the features, [N, P, F]."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the features."""
        return self.array.dtype.numpy_dtype

    def create_array(self, positions: int, feature_dim: int, dtype: str) -> ts.TensorStore:
        """Opens the features for writing, and creates them if there are none.

        Args:
          positions: P.
          feature_dim: F.
          dtype: a floating-point type, such as "bfloat16".

        Raises:
          StoreError: the array cannot be created, or there is one of another shape or dtype.
        """
        shape = [self.images, positions, feature_dim]
        try:
            return zarr.open_to_write(self.path / "features", shape, self.shard_rows, dtype)
        except ValueError as e:
            raise StoreError(
                f"{self.path / 'features'}: cannot be created, or holds an array of another kind ({zarr.reason(e)})"
            ) from e

    def write(self, array: ts.TensorStore, number: int, feats_NPF: np.ndarray, skipped: Iterable[Skipped]) -> None:
        """Writes a complete shard and its record.

        Args:
          array: of `create_array`.
          number: the shard.
          feats_NPF: the features of the shard's rows, NaN in the rows of skipped images.
          skipped: the shard's images without features.

        Raises:
          StoreError: the features cannot be written. The shard stays unfinished.
          WriteError: the record cannot be written. The shard stays unfinished.
        """
        span = self.shard(number)
        try:
            # TensorStore would read an older file first, which may be damaged.
            self.shard_file(number).unlink(missing_ok=True)
            array[span.start : span.stop].write(feats_NPF).result()
        except (ValueError, OSError) as e:
            raise StoreError(f"{self.path / 'features'}: shard {number} cannot be written ({zarr.reason(e)})") from e
        self.mark_finished(number, skipped)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns `feats_NPF` of these rows in the store's dtype.

        Raises:
          StoreError: a chunk is damaged, or a row has no features.
        """
        array = self.array
        try:
            feats_NPF = array[np.asarray(rows, np.int64)].read().result()
        except (ValueError, IndexError) as e:
            raise StoreError(
                f"{self.path / 'features'}: cannot be read ({zarr.reason(e)}); run `flaxcap verify`, then `flaxcap"
                " prepare`"
            ) from e
        # A row is one chunk, so it is written completely or not at all, and its first position is always in use.
        missing = np.isnan(feats_NPF[:, 0, 0].astype(np.float32))
        if missing.any():
            row = int(np.asarray(rows)[np.argmax(missing)])
            raise StoreError(f"{self.path / 'features'}: row {row} holds no features")
        return feats_NPF


def captions_text(rows: Iterable[Row]) -> str:
    """Returns the content of the file CAPTIONS."""
    fields = ({"id": r.image_id, "file": r.filename, "captions": r.captions, "image": r.digest} for r in rows)
    return "".join(json.dumps(each) + "\n" for each in fields)


def write_rows(path: epath.Path, rows: Iterable[Row]) -> None:
    """Writes the file CAPTIONS of a split's directory."""
    integrity.write_atomically(path / CAPTIONS, captions_text(rows))
