"""The prepared data on disk: features as sharded arrays, captions, vocabulary and encoder; made once, then only read.

    STORE/manifest.json             what this is made of, and what is finished
          vocabulary.json
          encoder/                  the network that made the features (Orbax)
          train|val|test/
              captions.jsonl        a line an image, in the order of the features' rows
              features/             [N, 64, F], TensorStore zarr3
              shards/00000.json     written when shard 0 is wholly on disk: its skipped images

Disks and object stores (`gs://…`) alike: paths are epath's, arrays TensorStore's.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from flaxcap import config as config_lib
from flaxcap.encoders import inception_v3
from flaxcap.errors import UserError
from flaxcap.text import Vocabulary

ROLES = ("train", "val", "test")
POSITIONS = inception_v3.GRID**2


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


def path_for(data_dir: epath.PathLike, config: config_lib.Config) -> epath.Path:
    """Where this preset's store is: a readable name, and a hash of the fields that the features depend on."""
    data, encoder = dataclasses.asdict(config.data), dataclasses.asdict(config.encoder)
    for text_field in ("vocab_size", "max_length"):
        del data[text_field]
    if config.dataset != "shapes":
        del data["shapes"]
    del encoder["batch_size"], encoder["shard_images"]
    # A file given by hand stands for the published one; which it was, the manifest says.
    if config.encoder.weights != "random":
        encoder |= {"weights": "pretrained", "seed": 0}
    key = json.dumps([config.dataset, data, encoder], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    name = f"{config.dataset}-{config.encoder.block}-{encoder['weights']}-{digest}"
    return epath.Path(data_dir).expanduser() / "features" / name


class Store:
    """A store that is there, finished or not. StoreError if there is none or its manifest cannot be read."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        file = self.path / "manifest.json"
        if not file.exists():
            raise StoreError(f"no prepared features at {self.path}; `flaxcap prepare` makes them")
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text())
            self.feature_dim = int(self.manifest["feature_dim"])
            splits = self.manifest["splits"]
            self._images = {role: int(splits[role]["images"]) for role in ROLES if role in splits}
            self._shard_rows = int(self.manifest["shard_rows"])
            _ = [self.manifest[a][b] for a, b in (("vocabulary", "size"), ("vocabulary", "sha256"))]
            _ = self.manifest["source"], self.manifest["encoder"]["weights_sha256"]
            if min(self.feature_dim, self._shard_rows, *self._images.values()) < 1:
                raise ValueError("a size that is not positive")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise StoreError(
                f"{file}: not a manifest of features ({e!r}); delete {self.path}, and `flaxcap prepare` makes it anew"
            ) from e
        self.roles = tuple(self._images)

    @classmethod
    def finished(cls, data_dir: epath.PathLike, config: config_lib.Config) -> "Store":
        """The store of a preset, wholly prepared and with the preset's vocabulary; StoreError says what is missing."""
        store = cls(path_for(data_dir, config))
        again = "run `flaxcap prepare` with the same --config and --data_dir"
        for role in store.roles:
            left = len(store.split(role).unfinished())
            if left:
                raise StoreError(f"{store.path}: {left} shards of split {role!r} are not finished; {again}")
        size = store.manifest["vocabulary"]["size"]
        if size != config.data.vocab_size:
            raise StoreError(
                f"{store.path}: its vocabulary was made with --config.data.vocab_size={size},"
                f" not {config.data.vocab_size}; {again}"
            )
        return store

    def split(self, role: str) -> "Split":
        if role not in self.roles:
            raise StoreError(f"{self.path}: no split {role!r}; there are {', '.join(self.roles)}")
        return Split(self.path / role, self._images[role], self._shard_rows)

    def vocabulary(self) -> Vocabulary:
        """The words that the manifest tells of; StoreError or VocabularyError if they are not there."""
        file = self.path / "vocabulary.json"
        try:
            found = Vocabulary.from_json(file.read_text(), str(file))
        except (OSError, UnicodeDecodeError) as e:
            raise StoreError(f"{file}: cannot be read ({e}); `flaxcap prepare` makes it anew") from e
        if found.hash != self.manifest["vocabulary"]["sha256"]:  # a prepare was stopped between the two files
            raise StoreError(f"{file}: not the vocabulary that the manifest names; `flaxcap prepare` makes it anew")
        return found


class Split:
    """One split: its images' captions, and their features by row."""

    def __init__(self, path: epath.Path, images: int, shard_rows: int):
        self.path, self.images, self.shard_rows = path, images, shard_rows

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.shard_rows)

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.images))

    @functools.cached_property
    def rows(self) -> list[Row]:
        """All images. StoreError if the file does not hold as many as the manifest says."""
        file = self.path / "captions.jsonl"
        try:
            lines = file.read_text().splitlines()
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

    def unfinished(self) -> list[int]:
        """The shards that are not wholly on disk."""
        folder = self.path / "shards"
        done = {f.name for f in folder.iterdir()} if folder.exists() else set()
        return [n for n in range(self.num_shards) if self._note(n).name not in done]

    def _note(self, number: int) -> epath.Path:
        return self.path / "shards" / f"{number:05d}.json"

    def finish(self, number: int, skipped: Iterable[Skipped]) -> None:
        """Notes that a shard is wholly on disk."""
        write_whole(self._note(number), json.dumps({"skipped": [dataclasses.asdict(s) for s in skipped]}) + "\n")

    def skipped(self) -> list[Skipped]:
        """The images without features, of the shards finished so far."""
        found: list[Skipped] = []
        for number in sorted(set(range(self.num_shards)) - set(self.unfinished())):
            file = self._note(number)
            try:
                found += [Skipped(**s) for s in json.loads(file.read_text())["skipped"]]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
                raise StoreError(f"{file}: cannot be read ({e!r}); delete it to have this shard made anew") from e
        return found

    def present(self) -> list[int]:
        """The rows that have features."""
        missing = {s.row for s in self.skipped()}
        return [row for row in range(self.images) if row not in missing]

    @functools.cached_property
    def array(self) -> ts.TensorStore:
        """`[N, P, F]`, opened for reading."""
        try:
            return ts.open(
                {"driver": "zarr3", "kvstore": _kvstore(self.path / "features")}, open=True, read=True
            ).result()
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

    def create_array(self, feature_dim: int, dtype: str) -> ts.TensorStore:
        """The array for writing, made if it is not there. StoreError if one of another shape is."""
        chunk = [1, POSITIONS, feature_dim]
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
            array[span.start : span.stop].write(feats_NPF).result()
        except ValueError as e:
            raise StoreError(f"{self.path / 'features'}: shard {number} cannot be written ({_reason(e)})") from e
        self.finish(number, skipped)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """`feats_NPF` of these rows, in the store's type. StoreError where a chunk is damaged or was never written."""
        try:
            feats_NPF = self.array[np.asarray(rows, np.int64)].read().result()
        except (ValueError, IndexError) as e:
            raise StoreError(f"{self.path / 'features'}: cannot be read ({_reason(e)})") from e
        # One number tells of each row: rows are written whole.
        missing = np.isnan(feats_NPF[:, 0, 0].astype(np.float32))
        if missing.any():
            row = int(np.asarray(rows)[np.argmax(missing)])
            raise StoreError(f"{self.path / 'features'}: row {row} holds no features")
        return feats_NPF


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that is seen whole or not at all. StoreError if it cannot be written."""
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except OSError as e:
        raise StoreError(f"{path}: cannot be written ({e.strerror or e})") from e


def write_rows(path: epath.Path, rows: Iterable[Row]) -> None:
    """The captions of a split."""
    lines = (json.dumps({"id": r.image_id, "file": r.filename, "captions": r.captions}) for r in rows)
    write_whole(path / "captions.jsonl", "".join(line + "\n" for line in lines))


def bytes_an_image(feature_dim: int, dtype: str) -> int:
    return POSITIONS * feature_dim * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _kvstore(path: epath.Path) -> str | dict[str, str]:
    text = str(path)
    # No file:// URL: in one, some characters that a path may hold mean something else.
    return text if "://" in text else {"driver": "file", "path": f"{path.resolve()}/"}


def _reason(error: Exception) -> str:
    """TensorStore's message without its many lines of context."""
    return re.split(r" \[\w+='", str(error))[0]
