"""`flaxcap prepare`: a data set, once, into a store of captions, vocabulary and features."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from flaxcap import checkpoint, data, features
from flaxcap import config as config_lib
from flaxcap import store as store_lib
from flaxcap.config import ConfigError
from flaxcap.encoders import images, inception_v3, weights
from flaxcap.store import Row, Store, StoreError
from flaxcap.text import Vocabulary, words

MEASURED_ON = 64  # pictures that a random encoder's batch norm is measured on


def prepare(
    config: config_lib.Config,
    data_dir: epath.PathLike,
    *,
    manual_dir: epath.PathLike | None = None,
    npy_dir: epath.PathLike | None = None,
    encoder_weights: str | None = None,
    num_workers: int = 4,
    max_bad_fraction: float = 0.05,
) -> Store:
    """Makes the preset's store, or goes on with it at the first unfinished shard.

    `npy_dir`: take the feature maps found there instead of computing them. `encoder_weights`: a file to use
    in place of the published one. Of several processes (one data_dir, shared) each extracts its share.
    """
    _check_encoder(config, encoder_weights)
    builder = None
    if jax.process_index() == 0:
        builder = data.of_preset(config, data_dir, manual_dir=manual_dir)
        _describe(config, data_dir, builder, npy_dir, encoder_weights)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("described")
    if builder is None:
        builder = data.of_preset(config, data_dir, manual_dir=manual_dir)
    store = Store(store_lib.path_for(data_dir, config))
    npy_dir = npy_dir or store.manifest["encoder"].get("imported_from")
    if any(store.split(role).unfinished() for role in store.roles):
        _check_space(store, config)
        _extract(store, config, builder, npy_dir, num_workers, max_bad_fraction)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("extracted")
    for role in store.roles:
        split = store.split(role)
        skipped = split.skipped()
        store.manifest["splits"][role] |= {
            "shards": split.num_shards,
            "skipped": [dataclasses.asdict(s) for s in skipped],
        }
        print(f"{role}: {split.images - len(skipped)} images with features, {len(skipped)} skipped")
    if jax.process_index() == 0:
        _write_manifest(store.path, store.manifest)
    print(f"prepared: {store.path}")
    return store


def _check_encoder(config: config_lib.Config, encoder_weights: str | None) -> None:
    """ConfigError if the encoder that is asked for cannot be."""
    encoder = config.encoder
    if encoder_weights is not None and "random" in (encoder_weights, encoder.weights):
        raise ConfigError(
            f"--encoder_weights={encoder_weights} with --config.encoder.weights={encoder.weights}: expected a file in"
            " place of the published weights; random ones are asked for by --config.encoder.weights=random alone"
        )
    try:
        inception_v3.check_size((1, encoder.image_size, encoder.image_size, 3), encoder.block)
    except ValueError as e:
        raise ConfigError(f"--config.encoder.image_size={encoder.image_size}: {e}") from e


def _describe(
    config: config_lib.Config,
    data_dir: epath.PathLike,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> None:
    """Writes everything but the features. Of a store that is there only the vocabulary is made anew."""
    path = store_lib.path_for(data_dir, config)
    if (path / "manifest.json").exists():
        manifest = Store(path).manifest
        _check_same(path, manifest, builder, config, npy_dir, encoder_weights)
    else:
        if any((path / role / "shards").exists() for role in store_lib.ROLES):
            raise StoreError(f"{path}: its manifest.json, which tells what made the features, is gone; delete the rest")
        splits = _write_captions(config, path, builder)
        feature_dim, encoder = _write_encoder(config, path, builder, npy_dir, encoder_weights)
        manifest = {
            "source": builder.info.full_name,
            "splits": splits,
            "encoder": encoder,
            "feature_dim": feature_dim,
            "shard_rows": config.encoder.shard_images,
        }
    rows = {
        role: store_lib.Split(path / role, split["images"], manifest["shard_rows"]).rows
        for role, split in manifest["splits"].items()
    }
    captions = (caption for row in rows["train"] for caption in row.captions)
    vocabulary = Vocabulary.of_captions(captions, config.data.vocab_size)
    for role in rows:
        _warn_of_unknown_words(role, rows[role], vocabulary)
    store_lib.write_whole(path / "vocabulary.json", vocabulary.to_json())
    manifest["vocabulary"] = {
        "size": config.data.vocab_size,
        "words": len(vocabulary),
        "sha256": vocabulary.hash,
    }
    _write_manifest(path, manifest)


def _warn_of_unknown_words(role: str, rows: list[Row], vocabulary: Vocabulary) -> None:
    unknown = [(row, c) for row in rows for c in row.captions if not any(w in vocabulary.ids for w in words(c))]
    if unknown:
        row, caption = unknown[0]
        logging.warning(
            "%s: %d captions hold no word of the vocabulary; the first is %r, of %s",
            role, len(unknown), caption[:80], row.filename,
        )  # fmt: skip


def _check_same(
    path: epath.Path,
    manifest: dict,
    builder: tfds.core.DatasetBuilder,
    config: config_lib.Config,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> None:
    """StoreError if the store was made of another data set or by other weights than are asked for now."""
    anew = "delete it, or take another --data_dir"
    if manifest["source"] != builder.info.full_name:
        raise StoreError(f"{path}: made of {manifest['source']}, not of {builder.info.full_name}; {anew}")
    made_by = manifest["encoder"]
    if npy_dir is not None and "imported_from" not in made_by:
        raise StoreError(f"{path}: its features were computed, not imported from {npy_dir}; {anew}")
    # "imagenet" and "random" are in the store's name; which file it was only the manifest says.
    spec = encoder_weights or config.encoder.weights
    if npy_dir is None and spec not in ("imagenet", "random"):
        _, found = weights.load(spec, block=config.encoder.block)
        if found != made_by["weights_sha256"]:
            by = made_by.get("imported_from") or f"weights {made_by['weights_sha256']}"
            raise StoreError(f"{path}: its features were made by {by}, not by {spec} ({found}); {anew}")


def _write_captions(config: config_lib.Config, path: epath.Path, builder: tfds.core.DatasetBuilder) -> dict:
    """The captions of every split; the manifest's words on them."""
    splits = {}
    for role, split in data.roles(config).items():
        try:
            examples = data.read(builder, split)
        except data.DataError as e:
            if role != "test":
                raise
            logging.warning("no test split: %s", e)
            continue
        rows = _rows(examples, config.data, f"captions of {role}")
        store_lib.write_rows(path / role, rows)
        splits[role] = {"split": split, "images": len(rows)}
    return splits


def _rows(examples: data.Split, limits: config_lib.Data, name: str) -> list[Row]:
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
) -> tuple[int, dict]:
    """Keeps the encoder beside the features, so that new pictures meet the same one; F, and the manifest's words."""
    encoder = config.encoder
    described = {"preset": dataclasses.asdict(encoder), "preprocessing": images.PREPROCESSING}
    examples = data.read(builder, config.data.train_split)
    if npy_dir is not None:
        feats = features.read_npy(epath.Path(npy_dir), examples[0].filename)
        return feats.shape[-1], described | {"weights_sha256": None, "imported_from": str(npy_dir)}
    spec = encoder_weights or encoder.weights
    sample = _sample(examples, encoder.image_size) if spec == "random" else None
    params, digest = weights.load(spec, block=encoder.block, seed=encoder.seed, measure_on=sample)
    checkpoint.save_params(path / "encoder", params)
    return inception_v3.FEATURES[encoder.block], described | {"weights_sha256": digest}


def _sample(examples: data.Split, image_size: int) -> np.ndarray:
    """The first readable pictures, uint8 [at most MEASURED_ON, size, size, 3]."""
    found = []
    for example in examples:
        try:
            found.append(images.decode(example.image, image_size))
        except images.ImageError:
            continue
        if len(found) == MEASURED_ON:
            break
    if not found:
        raise StoreError(f"{examples.name}: none of its pictures can be read")
    return np.stack(found)


def _extract(
    store: Store,
    config: config_lib.Config,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    num_workers: int,
    max_bad_fraction: float,
) -> None:
    """The features of every split that are not there yet."""
    encoder = config.encoder
    if npy_dir is None:
        encode = features.make_encode(checkpoint.load_params(store.path / "encoder"), encoder)
    for role in store.roles:
        split = store.split(role)
        if npy_dir is None:
            examples = data.read(builder, store.manifest["splits"][role]["split"])
            load = functools.partial(_pixels, examples, encoder.image_size)
        else:
            load, encode = features.npy_loader(epath.Path(npy_dir), split, store.feature_dim), np.asarray
        features.extract(
            split,
            load,
            encode,
            batch_size=features.batch_size(encoder),
            feature_dim=store.feature_dim,
            dtype=encoder.store_dtype,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            name=f"features of {role}",
        )


def _pixels(examples: data.Split, image_size: int, row: int) -> np.ndarray:
    return images.decode(examples[row].image, image_size)


def _check_space(store: Store, config: config_lib.Config) -> None:
    """Says what the features will take; StoreError if the disk has less."""
    images = sum(len(store.split(r).shard(n)) for r in store.roles for n in store.split(r).unfinished())
    needed = images * store_lib.bytes_an_image(store.feature_dim, config.encoder.store_dtype)
    text = f"features of {images} images: {needed / 1e9:.2f} GB in {store.path}"
    if "://" not in str(store.path):
        free = shutil.disk_usage(store.path).free
        if needed > free:
            raise StoreError(f"{text}, but only {free / 1e9:.2f} GB are free there")
        text += f" ({free / 1e9:.1f} GB free)"
    print(text)


def _write_manifest(path: epath.Path, manifest: dict) -> None:
    store_lib.write_whole(path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
