"""The prepared data on disk: features as sharded arrays, captions, vocabulary and encoder; made once, then only read.

    STORE/manifest.json             what this is made of, what is finished, and the SHA-256 of what is written once
          manifest.copy.json        the same again
          vocabulary.json
          encoder/                  the network that made the features (Orbax)
          train|val|test/           see split.py

Disks and object stores (`gs://…`) alike: paths are epath's, arrays TensorStore's.
"""

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from flaxcap import config as config_lib
from flaxcap.encoders import base as encoders
from flaxcap.features.shards import ARRAY, CAPTIONS, Row, Skipped, Split, StoreError, write_rows
from flaxcap.files import integrity
from flaxcap.files.integrity import DamagedError, write_whole
from flaxcap.text.vocabulary import Vocabulary

__all__ = [
    "ROLES",
    "Row",
    "Skipped",
    "Split",
    "Store",
    "StoreError",
    "bytes_an_image",
    "path_for",
    "read_manifest",
    "write_manifest",
    "write_rows",
    "write_whole",
]

ROLES = ("train", "val", "test")
ONCE = (CAPTIONS, ARRAY)  # files of a split that are written once
MANIFEST, COPY, VOCABULARY = "manifest.json", "manifest.copy.json", "vocabulary.json"
ENCODER_DIR = "encoder"


def path_for(data_dir: epath.PathLike, config: config_lib.Config) -> epath.Path:
    """Where this preset's store is: a readable name, and a hash of the fields that the features depend on."""
    fields = config_lib.identity(config, "store")
    if config.dataset != "shapes":
        fields = {name: value for name, value in fields.items() if not name.startswith("data.shapes.")}
    # A file given by hand stands for the published one; which it was, the manifest says.
    if config.encoder.weights != "random":
        fields |= {"encoder.weights": "pretrained", "encoder.seed": 0}
    encoder = encoders.make(config.encoder)  # its defaults are the same store as their values
    fields |= {"encoder.block": encoder.name, "encoder.image_size": encoder.preprocess.size}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{config.dataset}-{encoder.name}-{fields['encoder.weights']}-{digest}"
    return epath.Path(data_dir).expanduser() / "features" / name


class Store:
    """A store that is there, finished or not. StoreError if there is none or its manifest cannot be read."""

    def __init__(self, path: epath.PathLike, manifest: str = MANIFEST):
        self.path = epath.Path(path)
        file = self.path / manifest
        if not file.exists() and not (self.path / COPY).exists():
            raise StoreError(f"no prepared features at {self.path}; `flaxcap prepare` makes them")
        try:
            self.manifest = read_manifest(file)
            self.positions, self.feature_dim = (int(self.manifest[name]) for name in ("positions", "feature_dim"))
            self.positions_vary = bool(self.manifest["positions_vary"])  # then NaN fills a row's unused positions
            splits = self.manifest["splits"]
            self._images = {role: int(splits[role]["images"]) for role in ROLES if role in splits}
            self._shard_rows = int(self.manifest["shard_rows"])
            _ = [self.manifest[a][b] for a, b in (("vocabulary", "size"), ("vocabulary", "sha256"))]
            _ = self.manifest["source"], self.manifest["encoder"]["weights_sha256"]
            if min(self.positions, self.feature_dim, self._shard_rows, *self._images.values()) < 1:
                raise ValueError("a size that is not positive")
            self.sums = integrity.from_json(self.manifest["files"])
            _ = self.sums[VOCABULARY], [self.sums[f"{role}/{name}"] for role in self._images for name in ONCE]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            copied = (self.path / COPY).exists()
            mend = "restores it" if copied else "makes it anew"
            first = "" if copied else f"delete {self.path}, and "
            raise StoreError(f"{file}: not a manifest of features ({e!r}); {first}`flaxcap prepare` {mend}") from e
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
        sums = {name: self.sums[f"{role}/{name}"] for name in ONCE}
        return Split(self.path / role, self._images[role], self._shard_rows, sums)

    def vocabulary(self) -> Vocabulary:
        """The words that the manifest tells of; StoreError or VocabularyError if they are not there."""
        file = self.path / VOCABULARY
        try:
            data = file.read_bytes()
            found = Vocabulary.from_json(data.decode(), str(file))
        except (OSError, UnicodeDecodeError) as e:
            raise StoreError(f"{file}: cannot be read ({e}); `flaxcap prepare` makes it anew") from e
        if found.hash != self.manifest["vocabulary"]["sha256"]:  # a prepare was stopped between the two files
            raise StoreError(f"{file}: not the vocabulary that the manifest names; `flaxcap prepare` makes it anew")
        try:
            integrity.check_bytes(data, self.sums[VOCABULARY])
        except DamagedError as e:
            raise StoreError(f"{file}: {e}; `flaxcap prepare` makes it anew") from e
        return found


def read_manifest(file: epath.Path) -> dict[str, Any]:
    """A manifest, or its copy, without its own sum. OSError, ValueError or RecursionError if it cannot be read."""
    return integrity.unseal(file.read_bytes(), indent=2)


def write_manifest(path: epath.Path, manifest: dict[str, Any]) -> None:
    """To a store, twice: what the features were made of is told nowhere else."""
    for name in (COPY, MANIFEST):  # where there is a manifest, there is its copy
        write_whole(path / name, integrity.seal(manifest, indent=2))


def bytes_an_image(positions: int, feature_dim: int, dtype: str) -> int:
    return positions * feature_dim * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
