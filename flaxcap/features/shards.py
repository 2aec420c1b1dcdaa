"""One split of a store on disk: the captions of its images, and their features in shards.

SPLIT/captions.jsonl        a line an image, in the order of the features' rows
      features/             [N, P, F], TensorStore zarr3
      shards/00000.json     written when shard 0 is wholly on disk: its skipped images, its file's SHA-256
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from flaxcap.errors import UserError
from flaxcap.files import integrity
from flaxcap.files.integrity import DamagedError, Sum

CAPTIONS, ARRAY = "captions.jsonl", "features/zarr.json"  # a split's files that are written once, below its directory
_AGAIN = "`flaxcap prepare` makes it anew"


class StoreError(UserError):
    """A store that is missing, unfinished, damaged, or made of something else."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An image of a split, without its pixels."""

    image_id: int
    filename: str
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image without features, and why."""

    row: int
    filename: str
    reason: str


class Note(NamedTuple):
    """What is known of a shard that is wholly on disk."""

    skipped: list[Skipped]
    file: Sum | None  # None: all its images were skipped


class Split:
    """One split: its images' captions, and their features by row.

    `sums`: of its files CAPTIONS and ARRAY, as far as they are known; what is read is compared with them.
    """

    def __init__(self, path: epath.Path, images: int, shard_rows: int, sums: Mapping[str, Sum] | None = None):
        self.path, self.images, self.shard_rows = path, images, shard_rows
        self._sums = sums or {}

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.shard_rows)

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.images))

    @functools.cached_property
    def rows(self) -> list[Row]:
        """All images. StoreError if the file is not as it was written, or holds another number than it should."""
        file = self.path / CAPTIONS
        try:
            data = file.read_bytes()
            if CAPTIONS in self._sums:
                integrity.check_bytes(data, self._sums[CAPTIONS])
            lines = data.decode().splitlines()
        except DamagedError as e:
            raise StoreError(f"{file}: {e}; {_AGAIN}") from e
        except (OSError, ValueError) as e:
            raise StoreError(f"{file}: cannot be read ({e})") from e
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                r = json.loads(line)
                rows.append(Row(r["id"], r["file"], tuple(r["captions"])))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise StoreError(f"{file}: line {number} cannot be read ({e!r})") from e
        if len(rows) != self.images:
            raise StoreError(f"{file}: found {len(rows)} images, expected {self.images}")
        return rows

    # Shards

    def unfinished(self) -> list[int]:
        """The shards that are not wholly on disk."""
        folder = self.path / "shards"
        done = {f.name for f in folder.iterdir()} if folder.exists() else set()
        return [n for n in range(self.num_shards) if self.note_file(n).name not in done]

    def finished(self) -> list[int]:
        """The others."""
        return sorted(set(range(self.num_shards)) - set(self.unfinished()))

    def note_file(self, number: int) -> epath.Path:
        return self.path / "shards" / f"{number:05d}.json"

    def shard_file(self, number: int) -> epath.Path:
        return self.path / "features" / "c" / str(number) / "0" / "0"

    def finish(self, number: int, skipped: Iterable[Skipped]) -> None:
        """Notes that a shard is wholly on disk, and what its file is known again by."""
        file = self.shard_file(number)
        known = integrity.of_file(file)._asdict() if file.exists() else None
        note = {"skipped": [dataclasses.asdict(s) for s in skipped], "file": known}
        integrity.write_whole(self.note_file(number), integrity.seal(note))

    def undo(self, number: int) -> None:
        """Makes a shard an unfinished one. StoreError if it cannot."""
        try:
            self.note_file(number).unlink(missing_ok=True)
        except OSError as e:
            raise StoreError(f"{self.note_file(number)}: cannot be deleted ({e.strerror or e})") from e

    def note(self, number: int) -> Note:
        """Of a finished shard. StoreError if it is not as it was written."""
        file = self.note_file(number)
        try:
            found = integrity.unseal(file.read_bytes())
            known = found["file"]
            return Note(
                [Skipped(**s) for s in found["skipped"]],
                Sum(int(known["size"]), str(known["sha256"])) if known else None,
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise StoreError(f"{file}: cannot be read ({e}); `flaxcap prepare` makes this shard anew") from e

    def check_shard(self, number: int, tell: Callable[[int], object] | None = None) -> int:
        """The bytes of a finished shard's file; with `tell`, which hears of bytes as they are read, all are read.

        StoreError if its note is damaged, DamagedError if the file is not as it was written.
        """
        note, file = self.note(number), self.shard_file(number)
        if note.file is None:
            if len(note.skipped) < len(self.shard(number)):
                raise DamagedError("missing")
            return 0
        if tell is not None:
            integrity.check(file, note.file, tell)
        else:
            integrity.check_size(file, note.file)
        return note.file.size

    def skipped(self) -> list[Skipped]:
        """The images without features, of the shards finished so far."""
        return [s for number in self.finished() for s in self.note(number).skipped]

    def present(self) -> list[int]:
        """The rows that have features."""
        missing = {s.row for s in self.skipped()}
        return [row for row in range(self.images) if row not in missing]

    # Features

    @functools.cached_property
    def array(self) -> ts.TensorStore:
        """`[N, P, F]`, opened for reading."""
        try:
            if ARRAY in self._sums:
                integrity.check(self.path / ARRAY, self._sums[ARRAY])
            spec = {"driver": "zarr3", "kvstore": _kvstore(self.path / "features")}
            return ts.open(spec, open=True, read=True).result()
        except DamagedError as e:
            raise StoreError(f"{self.path / ARRAY}: {e}; {_AGAIN}") from e
        except (ValueError, KeyError) as e:
            raise StoreError(f"{self.path / 'features'}: cannot be opened ({_reason(e)})") from e

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features, `[N, P, F]`."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the features."""
        return self.array.dtype.numpy_dtype

    def create_array(self, positions: int, feature_dim: int, dtype: str) -> ts.TensorStore:
        """The array for writing, made if it is not there. StoreError if one of another shape is."""
        chunk = [1, positions, feature_dim]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": chunk,
            "codecs": [little, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
        }
        metadata = {
            "shape": [self.images, *chunk[1:]],
            "data_type": dtype,
            "fill_value": "NaN",  # a row that was never written cannot be taken for features
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *chunk[1:]]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        spec = {"driver": "zarr3", "kvstore": _kvstore(self.path / "features"), "metadata": metadata}
        try:
            return ts.open(spec, open=True, create=True).result()
        except ValueError as e:
            raise StoreError(
                f"{self.path / 'features'}: cannot be made, or holds an array of another kind ({_reason(e)})"
            ) from e

    def write(self, array: ts.TensorStore, number: int, feats_NPF: np.ndarray, skipped: Iterable[Skipped]) -> None:
        """Puts a whole shard on disk, then notes that it is there. StoreError if the disk does not take it."""
        span = self.shard(number)
        try:
            # What lies there from before is not to be read, and may be damaged.
            self.shard_file(number).unlink(missing_ok=True)
            array[span.start : span.stop].write(feats_NPF).result()
        except (ValueError, OSError) as e:
            raise StoreError(f"{self.path / 'features'}: shard {number} cannot be written ({_reason(e)})") from e
        self.finish(number, skipped)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """`feats_NPF` of these rows, in the store's type. StoreError where a chunk is damaged or was never written."""
        array = self.array
        try:
            feats_NPF = array[np.asarray(rows, np.int64)].read().result()
        except (ValueError, IndexError) as e:
            raise StoreError(
                f"{self.path / 'features'}: cannot be read ({_reason(e)}); run `flaxcap verify`, then `flaxcap prepare`"
            ) from e
        # One number tells of each row: rows are written whole.
        missing = np.isnan(feats_NPF[:, 0, 0].astype(np.float32))
        if missing.any():
            row = int(np.asarray(rows)[np.argmax(missing)])
            raise StoreError(f"{self.path / 'features'}: row {row} holds no features")
        return feats_NPF


def captions_text(rows: Iterable[Row]) -> str:
    """The file CAPTIONS of these images."""
    lines = (json.dumps({"id": r.image_id, "file": r.filename, "captions": r.captions}) for r in rows)
    return "".join(line + "\n" for line in lines)


def write_rows(path: epath.Path, rows: Iterable[Row]) -> None:
    """The captions of a split."""
    integrity.write_whole(path / CAPTIONS, captions_text(rows))


def _kvstore(path: epath.Path) -> str | dict[str, str]:
    text = str(path)
    # No file:// URL: in one, some characters that a path may hold mean something else.
    return text if integrity.is_remote(path) else {"driver": "file", "path": f"{path.resolve()}/"}


def _reason(error: Exception) -> str:
    """TensorStore's message without its many lines of context."""
    return re.split(r" \[\w+='", str(error))[0]
