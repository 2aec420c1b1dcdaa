"""`flaxcap prepare`: a data set, once, into a store of captions, vocabulary and features."""

import dataclasses
import functools
import types

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from flaxcap import config as config_lib
from flaxcap.config import ConfigError
from flaxcap.data import datasets
from flaxcap.data.base import Examples
from flaxcap.encoders import base as encoders
from flaxcap.encoders.base import ImageEncoder
from flaxcap.features import build, extract, npy_maps, repair
from flaxcap.features import store as store_lib
from flaxcap.features.store import Row, Store, StoreError
from flaxcap.files import disk_space, integrity, locks
from flaxcap.files.params import load_params
from flaxcap.images import decode
from flaxcap.images.preprocess import Preprocess
from flaxcap.runtime import multihost
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.text.words import words


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
    """Makes the preset's store, or goes on with it at the first unfinished shard, and mends what is damaged in it.

    `npy_dir`: take the feature maps found there instead of computing them. `encoder_weights`: a file to use
    in place of the published one. Of several processes (one data_dir, shared) each extracts its share. LockError if
    another prepare works on this store.
    """
    encoder = _make_encoder(config, encoder_weights)
    with locks.held(store_lib.path_for(data_dir, config)):
        builder = None

        def first() -> None:
            nonlocal builder
            builder = _dataset(config, data_dir, manual_dir)
            _describe(config, data_dir, builder, npy_dir, encoder_weights)

        multihost.first_does(first)
        if builder is None:
            builder = _dataset(config, data_dir, manual_dir)
        store = Store(store_lib.path_for(data_dir, config))
        npy_dir = npy_dir or store.manifest["encoder"].get("imported_from")
        if any(store.split(role).unfinished() for role in store.roles):
            _check_space(store, config)
            _extract(store, config, encoder, builder, npy_dir, num_workers, max_bad_fraction)
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
            store_lib.write_manifest(store.path, store.manifest)
    print(f"prepared: {store.path}")
    return store


def _dataset(
    config: config_lib.Config, data_dir: epath.PathLike, manual_dir: epath.PathLike | None
) -> tfds.core.DatasetBuilder:
    """The data set, prepared. Of several programs that want to prepare it the others wait for the first."""
    root = datasets.local_dir(data_dir)
    directory = root / config.dataset
    if config.dataset not in datasets.NAMES:
        return datasets.prepare_for(config, data_dir, manual_dir=manual_dir)
    with locks.flock(root / f".{config.dataset}.lock", str(directory), wait=True):
        for left in (*directory.glob("incomplete.*"), *directory.glob("*/incomplete.*")):  # TFDS's, of one killed
            left.rmtree() if left.is_dir() else left.unlink()
        return datasets.prepare_for(config, data_dir, manual_dir=manual_dir)


def _make_encoder(config: config_lib.Config, encoder_weights: str | None) -> ImageEncoder:
    """Returns the preset's encoder. Raises ConfigError if the preset and --encoder_weights contradict each other."""
    fields = config.encoder
    if encoder_weights is not None and "random" in (encoder_weights, fields.weights):
        raise ConfigError(
            f"--encoder_weights={encoder_weights} with --config.encoder.weights={fields.weights}: expected a file in"
            " place of the published weights; random ones are asked for by --config.encoder.weights=random alone"
        )
    return encoders.make(fields)


def _describe(
    config: config_lib.Config,
    data_dir: epath.PathLike,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> None:
    """Writes everything but the features.

    Of a store that is there the vocabulary is made anew, and what is damaged. StoreError if it is made of something
    else.
    """
    path = store_lib.path_for(data_dir, config)
    repair.restore_manifest(path)
    if (path / store_lib.MANIFEST).exists():
        found = Store(path)
        manifest = found.manifest
        _check_same(path, manifest, builder, config, npy_dir, encoder_weights)
        sums = repair.mend(found, config, builder, encoder_weights)
    else:
        manifest, sums = build.make(path, config, builder, npy_dir, encoder_weights)
    rows = {
        role: store_lib.Split(path / role, split["images"], manifest["shard_rows"]).rows
        for role, split in manifest["splits"].items()
    }
    captions = (caption for row in rows["train"] for caption in row.captions)
    vocabulary = Vocabulary.of_captions(captions, config.data.vocab_size)
    for role in rows:
        _warn_of_unknown_words(role, rows[role], vocabulary)
    text = vocabulary.to_json()
    integrity.write_whole(path / store_lib.VOCABULARY, text)
    manifest["vocabulary"] = {
        "size": config.data.vocab_size,
        "words": len(vocabulary),
        "sha256": vocabulary.hash,
    }
    manifest["files"] = integrity.to_json(sums | {store_lib.VOCABULARY: integrity.of_bytes(text.encode())})
    store_lib.write_manifest(path, manifest)


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
        _, found = encoders.make(config.encoder).load(spec)
        if found != made_by["weights_sha256"]:
            by = made_by.get("imported_from") or f"weights {made_by['weights_sha256']}"
            raise StoreError(f"{path}: its features were made by {by}, not by {spec} ({found}); {anew}")


def _extract(
    store: Store,
    config: config_lib.Config,
    encoder: ImageEncoder,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    num_workers: int,
    max_bad_fraction: float,
) -> None:
    """The features of every split that are not there yet."""
    if npy_dir is None:
        params = load_params(store.path / store_lib.ENCODER_DIR)
        encode = extract.make_encode(encoder, params, config.encoder, many=True)
    for role in store.roles:
        split = store.split(role)
        if npy_dir is None:
            examples = Examples(builder, store.manifest["splits"][role]["split"])
            load = functools.partial(_pixels, examples, encoder.preprocess)
        else:
            shape = npy_maps.FeatureShape(store.positions, store.feature_dim, store.positions_vary)
            load, encode = npy_maps.loader(epath.Path(npy_dir), split, shape), np.asarray
        extract.extract(
            split,
            load,
            encode,
            batch_size=extract.batch_size(config.encoder),
            at_once=extract.batches_at_once(),
            positions=store.positions,
            feature_dim=store.feature_dim,
            dtype=config.encoder.store_dtype,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            name=f"features of {role}",
        )


def _pixels(examples: Examples, preprocess: Preprocess, row: int) -> np.ndarray:
    return decode.for_encoder(examples[row].image, preprocess)


def _check_space(store: Store, config: config_lib.Config) -> None:
    """Says what the features will take; WriteError if the disk has less."""
    images = sum(len(store.split(r).shard(n)) for r in store.roles for n in store.split(r).unfinished())
    needed = images * store_lib.bytes_an_image(store.positions, store.feature_dim, config.encoder.store_dtype)
    what = f"features of {images} images"
    free = disk_space.check(store.path, needed, what, "free some, or take another --data_dir")
    print(f"{what}: {needed / 1e9:.2f} GB in {store.path}{f' ({free / 1e9:.1f} GB free)' if free is not None else ''}")


def run(flags: types.SimpleNamespace, config: config_lib.Config, positional: list[str]) -> int:
    """Runs `flaxcap prepare` and returns its exit status."""
    prepare(
        config,
        flags.data_dir,
        manual_dir=flags.manual_dir,
        npy_dir=flags.npy_dir,
        encoder_weights=flags.encoder_weights,
        num_workers=flags.num_workers,
        max_bad_fraction=flags.max_bad_fraction,
    )
    return 0
