"""The prepared data: features, captions and vocabulary. They are written once, then only read.

    STORE/manifest.json             what the store is made of, and the checksums of the files written once
          manifest.copy.json        the same
          vocabulary.json
          encoder/                  the parameters of the encoder that computed the features
          train|val|test/           see shards.py

A store is on a disk or in an object store (`gs://…`).
"""

import dataclasses
import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from flaxcap import config as config_lib
from flaxcap.encoders import base as encoders
from flaxcap.features.shards import CAPTIONS, WRITTEN_ONCE, Split, StoreError
from flaxcap.files import integrity
from flaxcap.files.integrity import DamagedError
from flaxcap.text.vocabulary import Vocabulary

ROLES = ("train", "val", "test")
MANIFEST, COPY, VOCABULARY = "manifest.json", "manifest.copy.json", "vocabulary.json"
ENCODER_DIR = "encoder"


def path_for(data_dir: epath.PathLike, config: config_lib.Config) -> epath.Path:
    """Returns the directory of a preset's store. Its name ends with a hash of the fields that matter."""
    fields = config_lib.identity(config, "store")
    if config.dataset != "shapes":
        fields = {name: value for name, value in fields.items() if not name.startswith("data.shapes.")}
    # Weights of a file and the published ones share a store; the manifest holds the SHA-256 of the weights in use.
    if config.encoder.weights != "random":
        fields |= {"encoder.weights": "pretrained", "encoder.seed": 0}
    if config.encoder.name == encoders.IMPORTED:
        kept = ("encoder.name", "encoder.store_dtype")
        fields = {name: value for name, value in fields.items() if name in kept or not name.startswith("encoder.")}
        return (
            epath.Path(data_dir).expanduser() / "features" / f"{config.dataset}-{encoders.IMPORTED}-{_digest(fields)}"
        )
    encoder = encoders.make(config.encoder)  # resolves defaults, so that a default and its value share a store
    fields |= {"encoder.block": encoder.name, "encoder.image_size": encoder.preprocess.size}
    name = f"{config.dataset}-{encoder.name}-{fields['encoder.weights']}-{_digest(fields)}"
    return epath.Path(data_dir).expanduser() / "features" / name


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def resolve(data_dir: epath.PathLike, config: config_lib.Config) -> config_lib.Config:
    """Returns the preset, for imported features if only those are prepared."""
    encoder = dataclasses.replace(config.encoder, name=encoders.IMPORTED)
    imported = dataclasses.replace(config, encoder=encoder)
    if not _exists(data_dir, config) and _exists(data_dir, imported):
        return imported
    return config


def _exists(data_dir: epath.PathLike, config: config_lib.Config) -> bool:
    return (path_for(data_dir, config) / MANIFEST).exists()


class Store:
    """A store on disk, finished or not.

    Args:
      path: the directory.
      manifest: the manifest's file name, or that of its copy.

    Raises:
      StoreError: there is no store, or its manifest is damaged.
    """

    def __init__(self, path: epath.PathLike, manifest: str = MANIFEST):
        self.path = epath.Path(path)
        file, copy = self.path / manifest, self.path / COPY
        if not file.exists() and not copy.exists():
            raise StoreError(
                f"no prepared features at {self.path}; give the --data_dir that holds them, or `flaxcap prepare`"
                " computes them"
            )
        try:
            self.manifest = read_manifest(file)
            self.positions, self.feature_dim = (int(self.manifest[name]) for name in ("positions", "feature_dim"))
            # True: the number of positions varies between images, and NaN fills a row's unused positions.
            self.positions_vary = bool(self.manifest["positions_vary"])
            splits = self.manifest["splits"]
            self._images = {role: int(splits[role]["images"]) for role in ROLES if role in splits}
            self._shard_rows = int(self.manifest["shard_rows"])
            if min(self.positions, self.feature_dim, self._shard_rows, *self._images.values()) < 1:
                raise ValueError("found a size below 1")
            self.checksums = integrity.checksums_from_json(self.manifest["files"])
            # A field that is missing is named now, not where it is used.
            _ = self.manifest["source"], self.manifest["fingerprint"], self.manifest["encoder"]["weights_sha256"]
            _ = [self.manifest["vocabulary"][name] for name in ("size", "tokenizer", "sha256")]
            _ = self.checksums[VOCABULARY], [self._split_checksums(role) for role in self._images]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            remedy = "`flaxcap prepare` restores it"
            if not copy.exists():
                remedy = f"delete {self.path}, then `flaxcap prepare` computes the features again"
            raise StoreError(f"{file}: not a manifest of features ({e!r}); {remedy}") from e
        self.roles = tuple(self._images)

    @classmethod
    def finished(cls, data_dir: epath.PathLike, config: config_lib.Config) -> "Store":
        """Returns the finished store of a preset.

        Raises:
          StoreError: there is no store, shards are not finished, or the vocabulary has another size or tokenizer than
            the preset's.
        """
        store = cls(path_for(data_dir, config))
        remedy = "run `flaxcap prepare` with the same --config and --data_dir"
        for role in store.roles:
            left = len(store.split(role).unfinished())
            if left:
                raise StoreError(f"{store.path}: {left} shards of split {role!r} are not finished; {remedy}")
        made = store.manifest["vocabulary"]
        for name, found, expected in (
            ("vocab_size", made["size"], config.data.vocab_size),
            ("tokenizer", made["tokenizer"], config.data.tokenizer),
        ):
            if found != expected:
                raise StoreError(
                    f"{store.path}: found a vocabulary made with --config.data.{name}={found}, expected"
                    f" {expected}; {remedy}"
                )
        return store

    def split(self, role: str) -> Split:
        """Returns a split by role: "train", "val" or "test".

        Raises:
          StoreError: the store has no such split.
        """
        if role not in self.roles:
            raise StoreError(f"{self.path}: found no split {role!r}, expected one of {', '.join(self.roles)}")
        return Split(self.path / role, self._images[role], self._shard_rows, self._split_checksums(role))

    def digests(self) -> dict[str, str]:
        """Returns a SHA-256 of the images and captions of the splits that training reads."""
        return {role: self.checksums[f"{role}/{CAPTIONS}"].sha256 for role in ("train", "val")}

    def _split_checksums(self, role: str) -> dict[str, integrity.Checksum]:
        return {name: self.checksums[f"{role}/{name}"] for name in WRITTEN_ONCE}

    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary that the manifest names.

        Raises:
          StoreError: the file is missing or damaged, or holds another vocabulary.
          VocabularyError: the file holds no vocabulary.
        """
        file, remedy = self.path / VOCABULARY, "`flaxcap prepare` writes it again"
        try:
            data = file.read_bytes()
            found = Vocabulary.from_json(data.decode(), str(file))
        except (OSError, UnicodeDecodeError) as e:
            raise StoreError(f"{file}: cannot be read ({e}); {remedy}") from e
        # A prepare that was killed after it wrote the vocabulary has left the older manifest.
        if found.hash != self.manifest["vocabulary"]["sha256"]:
            raise StoreError(f"{file}: found another vocabulary than the manifest names; {remedy}")
        try:
            integrity.check_bytes(data, self.checksums[VOCABULARY])
        except DamagedError as e:
            raise StoreError(f"{file}: {e}; {remedy}") from e
        return found


def read_manifest(file: epath.Path) -> dict[str, Any]:
    """Returns a manifest or its copy. Raises OSError, ValueError or RecursionError if it is missing or damaged."""
    return integrity.unseal(file.read_bytes(), indent=2)


def write_manifest(path: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a store and its copy. No other file says what the features were made of."""
    for name in (COPY, MANIFEST):  # in this order: a store with a manifest has a copy
        integrity.write_atomically(path / name, integrity.seal(manifest, indent=2))


def bytes_an_image(positions: int, feature_dim: int, dtype: str) -> int:
    """Returns the bytes that the features of an image take."""
    return positions * feature_dim * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
