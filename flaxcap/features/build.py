"""The first part of a new store: captions, encoder, empty arrays, and a manifest that describes them."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath

from flaxcap import config as config_lib
from flaxcap.data import copies, datasets
from flaxcap.data.base import DataError, Examples
from flaxcap.encoders import base as encoders
from flaxcap.encoders.base import Params
from flaxcap.features import npy_maps, renewal, store
from flaxcap.features.npy_maps import FeatureShape
from flaxcap.features.shards import ARRAY, CAPTIONS, Row, Split, StoreError, captions_text
from flaxcap.files import integrity
from flaxcap.files.integrity import Checksum
from flaxcap.files.params import save_params
from flaxcap.images import decode
from flaxcap.images.preprocess import Preprocess

SAMPLE_IMAGES = 64  # images whose statistics random weights may be scaled by


def create(
    path: epath.Path,
    config: config_lib.Config,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> tuple[dict, dict[str, Checksum]]:
    """Writes a new store without its vocabulary, manifest and features.

    Args:
      path: the store's directory.
      config: the preset.
      builder: the preset's data set.
      npy_dir: the directory of imported feature maps, see npy_maps.py. None: the preset's encoder computes them.
      encoder_weights: a file that replaces the preset's weights.

    Returns:
      The manifest without its fields `vocabulary` and `files`, and the checksums of captions and arrays.

    Raises:
      StoreError: the directory holds shards without a manifest, or a feature map cannot be imported.
      DataError: the data set has no split of the preset's name.
    """
    if any((path / role / "shards").exists() for role in store.ROLES):
        raise StoreError(
            f"{path}: found shards without a {store.MANIFEST}, which says what made the features; delete the directory"
        )
    rows = _read_splits(config, builder)
    shape, encoder = _write_encoder(config, path, builder, npy_dir, encoder_weights, _filenames(rows))
    for role in rows:
        if (path / role / "features").exists():  # a prepare that was killed may have written it for other captions
            (path / role / "features").rmtree()
    manifest = {"encoder": encoder, **shape._asdict(), "shard_rows": config.encoder.shard_images}
    return _write_splits(path, config, builder, rows, manifest)


def renew(
    found: store.Store, config: config_lib.Config, builder: tfds.core.DatasetBuilder
) -> tuple[dict, dict[str, Checksum]]:
    """Writes the splits of a store whose data set has changed. Complete shards of unchanged images are kept.

    Args:
      found: the store.
      config: the preset.
      builder: the preset's data set.

    Returns:
      See `create`.

    Raises:
      StoreError: a feature map cannot be imported.
      DataError: the data set has no split of the preset's name.
    """
    path, manifest = found.path, found.manifest
    rows = _read_splits(config, builder)
    if "imported_from" in manifest["encoder"]:
        shape = npy_maps.find_shape(epath.Path(manifest["encoder"]["imported_from"]), _filenames(rows))
        manifest |= shape._asdict()
    for role in store.ROLES:
        renewal.set_aside(path, role)
    manifest, checksums = _write_splits(path, config, builder, rows, manifest)
    if "imported_from" not in manifest["encoder"]:
        for role in rows:
            new = Split(path / role, len(rows[role]), manifest["shard_rows"])
            for old in renewal.old_splits(path, role, new.shard_rows):
                renewal.move_shards(old, new)
    return manifest, checksums


def _write_splits(
    path: epath.Path,
    config: config_lib.Config,
    builder: tfds.core.DatasetBuilder,
    rows: dict[str, list[Row]],
    manifest: dict,
) -> tuple[dict, dict[str, Checksum]]:
    """Writes the captions of every split and creates its array.

    Args:
      path: the store's directory.
      config: the preset.
      builder: the preset's data set.
      rows: of each split.
      manifest: the fields `encoder`, `shard_rows` and those of FeatureShape.

    Returns:
      See `create`.
    """
    checksums = {}
    for role in rows:
        text = captions_text(rows[role])
        integrity.write_atomically(path / role / CAPTIONS, text)
        checksums[f"{role}/{CAPTIONS}"] = Checksum.of_bytes(text.encode())
        split = Split(path / role, len(rows[role]), manifest["shard_rows"])
        split.create_array(manifest["positions"], manifest["feature_dim"], config.encoder.store_dtype)
        checksums[f"{role}/{ARRAY}"] = Checksum.of_file(split.path / ARRAY)
    about = {
        "source": builder.info.full_name,
        "fingerprint": copies.fingerprint(builder),
        "splits": {role: {"split": datasets.splits(config)[role], "images": len(rows[role])} for role in rows},
    }
    return manifest | about, checksums


def _filenames(rows: dict[str, list[Row]]) -> list[str]:
    return [row.filename for role in rows for row in rows[role]]


def _read_splits(config: config_lib.Config, builder: tfds.core.DatasetBuilder) -> dict[str, list[Row]]:
    """Returns the rows of every split by role. The preset's test split may be missing."""
    found = {}
    for role in datasets.splits(config):
        try:
            examples = datasets.examples_of(config, builder, role)
        except DataError as e:
            if role != "test":
                raise
            logging.warning("no test split: %s", e)
            continue
        found[role] = read_rows(examples, config.data, f"captions of {role}")
    return found


def read_rows(examples: Examples, limits: config_lib.Data, name: str) -> list[Row]:
    """Returns the images of a split and their captions.

    Args:
      examples: the split.
      limits: `max_images` and `max_captions` bound the numbers of images and of captions; 0 means no bound.
      name: the name of the progress bar.
    """
    rows, captions = [], 0
    numbers = range(min(len(examples), limits.max_images or len(examples)))
    for number in tqdm.tqdm(numbers, name, unit=" images", disable=None):
        left = limits.max_captions - captions if limits.max_captions else None
        if left == 0:
            break
        example = examples[number]
        rows.append(Row(example.image_id, example.filename, example.captions[:left], example.digest))
        captions += len(rows[-1].captions)
    return rows


def _write_encoder(
    config: config_lib.Config,
    path: epath.Path,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
    filenames: list[str],
) -> tuple[FeatureShape, dict]:
    """Writes the encoder's parameters into the store, where captioning finds them. Imported features have none.

    Returns:
      The shape of the features, and the manifest's field `encoder`.
    """
    encoder = encoders.make(config.encoder)
    if npy_dir is not None:
        shape = npy_maps.find_shape(epath.Path(npy_dir), filenames)
        first = Checksum.of_file(epath.Path(npy_dir) / f"{filenames[0]}.npy").sha256  # tells one import from another
        return shape, {"name": encoder.name, "weights_sha256": first, "imported_from": str(npy_dir)}
    described = {
        "name": encoder.name,
        "preset": dataclasses.asdict(config.encoder),
        "preprocessing": decode.describe(encoder.preprocess),
    }
    params, digest = read_encoder(config, builder, encoder_weights)
    save_params(path / store.ENCODER_DIR, params)
    return FeatureShape(encoder.positions, encoder.features), described | {"weights_sha256": digest}


def read_encoder(
    config: config_lib.Config, builder: tfds.core.DatasetBuilder, encoder_weights: str | None
) -> tuple[Params, str]:
    """Returns the parameters of the preset's encoder, and their SHA-256."""
    encoder = encoders.make(config.encoder)

    def sample() -> np.ndarray:
        return _sample(Examples(builder, config.data.train_split), encoder.preprocess)

    return encoder.load(encoder_weights or config.encoder.weights, sample)


def _sample(examples: Examples, preprocess: Preprocess) -> np.ndarray:
    """Returns the first readable images, uint8 [at most SAMPLE_IMAGES, size, size, 3]."""
    found = []
    for example in examples:
        try:
            found.append(decode.for_encoder(example.image, preprocess))
        except decode.ImageError:
            continue
        if len(found) == SAMPLE_IMAGES:
            break
    if not found:
        raise StoreError(f"{examples.name}: found no readable image, expected at least one")
    return np.stack(found)
