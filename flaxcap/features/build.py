"""What stands beside the features of a store, made: its captions, its encoder, and what the manifest says of them."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath

from flaxcap import config as config_lib
from flaxcap.data import datasets
from flaxcap.data.base import DataError, Examples
from flaxcap.encoders import base as encoders
from flaxcap.encoders.base import Params
from flaxcap.features import npy_maps, store
from flaxcap.features.npy_maps import FeatureShape
from flaxcap.features.shards import ARRAY, CAPTIONS, Row, Split, StoreError, captions_text
from flaxcap.files import integrity
from flaxcap.files.integrity import Sum
from flaxcap.files.params import save_params
from flaxcap.images import decode
from flaxcap.images.preprocess import Preprocess

SAMPLE_IMAGES = 64  # whose statistics the batch norms of random weights take


def make(
    path: epath.Path,
    config: config_lib.Config,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> tuple[dict, dict[str, Sum]]:
    """The manifest of a new store, without vocabulary, and the sums of the files written."""
    if any((path / role / "shards").exists() for role in store.ROLES):
        raise StoreError(f"{path}: its {store.MANIFEST}, which tells what made the features, is gone; delete the rest")
    sums: dict[str, Sum] = {}
    rows = _write_captions(config, path, builder, sums)
    filenames = [row.filename for role in rows for row in rows[role]]
    shape, encoder = _write_encoder(config, path, builder, npy_dir, encoder_weights, filenames)
    for role in rows:
        if (path / role / "features").exists():  # of a prepare that was killed; perhaps of other captions
            (path / role / "features").rmtree()
        split = Split(path / role, len(rows[role]), config.encoder.shard_images)
        split.create_array(shape.positions, shape.feature_dim, config.encoder.store_dtype)
        sums[f"{role}/{ARRAY}"] = integrity.of_file(split.path / ARRAY)
    manifest = {
        "source": builder.info.full_name,
        "splits": {role: {"split": datasets.splits(config)[role], "images": len(rows[role])} for role in rows},
        "encoder": encoder,
        **shape._asdict(),
        "shard_rows": config.encoder.shard_images,
    }
    return manifest, sums


def _write_captions(
    config: config_lib.Config, path: epath.Path, builder: tfds.core.DatasetBuilder, sums: dict[str, Sum]
) -> dict[str, list[Row]]:
    """The captions of every split, written and returned. Their sums are put into `sums`."""
    found = {}
    for role, split in datasets.splits(config).items():
        try:
            examples = Examples(builder, split)
        except DataError as e:
            if role != "test":
                raise
            logging.warning("no test split: %s", e)
            continue
        rows = read_rows(examples, config.data, f"captions of {role}")
        text = captions_text(rows)
        integrity.write_whole(path / role / CAPTIONS, text)
        sums[f"{role}/{CAPTIONS}"] = integrity.of_bytes(text.encode())
        found[role] = rows
    return found


def read_rows(examples: Examples, limits: config_lib.Data, name: str) -> list[Row]:
    """The images of a split, up to the preset's limits."""
    rows, captions = [], 0
    numbers = range(min(len(examples), limits.max_images or len(examples)))
    for number in tqdm.tqdm(numbers, name, unit=" images", disable=None):
        left = limits.max_captions - captions if limits.max_captions else None
        if left == 0:
            break
        example = examples[number]
        rows.append(Row(example.image_id, example.filename, example.captions[:left]))
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
    """Keeps the encoder beside the features, so that new pictures meet the same one; the features' shape, and the
    manifest's words.
    """
    encoder = encoders.make(config.encoder)
    described = {
        "name": encoder.name,
        "preset": dataclasses.asdict(config.encoder),
        "preprocessing": decode.describe(encoder.preprocess),
    }
    if npy_dir is not None:
        shape = npy_maps.find_shape(epath.Path(npy_dir), filenames)
        return shape, described | {"weights_sha256": None, "imported_from": str(npy_dir)}
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
        raise StoreError(f"{examples.name}: none of its pictures can be read")
    return np.stack(found)
