"""`flaxcap prepare`: writes the captions, vocabulary and features of a data set into a store."""

import dataclasses
import functools
import sys
import types

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from flaxcap import config as config_lib
from flaxcap.config import ConfigError
from flaxcap.data import copies, datasets
from flaxcap.data.base import Examples
from flaxcap.encoders import base as encoders
from flaxcap.encoders.base import ImageEncoder
from flaxcap.features import build, extract, npy_maps, overlap, renewal, repair
from flaxcap.features import store as store_lib
from flaxcap.features.shards import Split, StoreError
from flaxcap.features.store import Store
from flaxcap.files import disk_space, integrity, locks
from flaxcap.files.integrity import Checksum
from flaxcap.files.params import load_params
from flaxcap.images import decode
from flaxcap.images.preprocess import Preprocess
from flaxcap.runtime import multihost
from flaxcap.text import report
from flaxcap.text.vocabulary import Vocabulary


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
    """Writes the store of a preset, or repairs and finishes the one that is there.

    Extraction resumes at the first unfinished shard. Several processes that share `data_dir` extract a share each.

    Args:
      config: the preset.
      data_dir: a directory on a disk or in an object store.
      manual_dir: the user's own files of the data set.
      npy_dir: feature maps to import, see npy_maps.py. None: the preset's encoder computes the features, unless the
        store of an import is the only one.
      encoder_weights: a file that replaces the published weights.
      num_workers: threads that load images.
      max_bad_fraction: the largest fraction of a split's images that may be skipped as missing or unreadable.

    Raises:
      LockError: another prepare works on this store.
      UserError: the preset, the data set, the weights or the store cannot be used. The message says why.
    """
    if npy_dir is not None:
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, name=encoders.IMPORTED))
    elif encoder_weights is None:
        config = store_lib.resolve(data_dir, config)
    encoder = _make_encoder(config, encoder_weights)
    path = store_lib.path_for(data_dir, config)
    with locks.held(path):
        builder = None

        def first() -> None:
            nonlocal builder
            builder = _dataset(config, data_dir, manual_dir, max_bad_fraction)
            _write_all_but_features(path, config, builder, npy_dir, encoder_weights)
            repair.retry_skipped(Store(path), builder, encoder.preprocess)

        multihost.first_does(first)
        if builder is None:
            builder = _dataset(config, data_dir, manual_dir, max_bad_fraction)
        store = Store(path)
        npy_dir = npy_dir or store.manifest["encoder"].get("imported_from")
        if any(store.split(role).unfinished() for role in store.roles):
            _check_space(store, config)
            _extract(store, config, encoder, builder, npy_dir, num_workers, max_bad_fraction)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("extracted")
        if jax.process_index() == 0:
            for role in store_lib.ROLES:
                renewal.clean_up(path, role)
        _write_summary(store)
    print(f"prepared: {store.path}")
    return store


def _dataset(
    config: config_lib.Config, data_dir: epath.PathLike, manual_dir: epath.PathLike | None, max_bad_fraction: float
) -> tfds.core.DatasetBuilder:
    """Returns the builder of the prepared data set. A lock lets one program at a time prepare it."""
    root = datasets.local_dir(data_dir)
    directory = root / config.dataset
    if config.dataset not in datasets.NAMES:
        return datasets.prepare_for(config, data_dir, manual_dir=manual_dir, max_bad_fraction=max_bad_fraction)
    with locks.flock(root / f".{config.dataset}.lock", str(directory), wait=True):
        for left in (*directory.glob("incomplete.*"), *directory.glob("*/incomplete.*")):
            # TFDS 4.9 leaves these of a process that was killed.
            left.rmtree() if left.is_dir() else left.unlink()
        return datasets.prepare_for(config, data_dir, manual_dir=manual_dir, max_bad_fraction=max_bad_fraction)


def _make_encoder(config: config_lib.Config, encoder_weights: str | None) -> ImageEncoder:
    """Returns the preset's encoder. Raises ConfigError if the preset and --encoder_weights contradict each other."""
    fields = config.encoder
    if encoder_weights is not None and "random" in (encoder_weights, fields.weights):
        raise ConfigError(
            f"--encoder_weights={encoder_weights} with --config.encoder.weights={fields.weights}: expected a file in"
            " place of the published weights; for random weights give --config.encoder.weights=random alone"
        )
    return encoders.make(fields)


def _write_all_but_features(
    path: epath.Path,
    config: config_lib.Config,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> None:
    """Writes captions, encoder, vocabulary and manifest of a new store, or repairs those of an existing one.

    A changed data set renews the splits. The vocabulary is always written again, since the preset may ask for another
    size. Raises StoreError if the existing store was made of another data set.
    """
    repair.restore_manifest(path)
    if (path / store_lib.MANIFEST).exists():
        found = Store(path)
        manifest = found.manifest
        _check_same(found, builder, config, npy_dir, encoder_weights)
        repair.repair_encoder(found, config, builder, encoder_weights)
        if manifest["fingerprint"] == copies.fingerprint(builder):
            checksums = repair.repair(found, config, builder)
        else:
            manifest, checksums = build.renew(found, config, builder)
    else:
        manifest, checksums = build.create(path, config, builder, npy_dir, encoder_weights)
    rows = {
        role: Split(path / role, split["images"], manifest["shard_rows"]).rows
        for role, split in manifest["splits"].items()
    }
    for line in overlap.lines(rows):
        logging.warning("%s", line)
    captions = {role: [(row.filename, text) for row in some for text in row.captions] for role, some in rows.items()}
    training_captions = (caption for _, caption in captions["train"])
    vocabulary = Vocabulary.of_captions(training_captions, config.data.vocab_size, config.data.tokenizer)
    for line in report.warnings(captions, vocabulary, config.data.max_length):
        print(line)
    text = vocabulary.to_json()
    integrity.write_atomically(path / store_lib.VOCABULARY, text)
    manifest["vocabulary"] = {
        "size": config.data.vocab_size,
        "tokenizer": config.data.tokenizer,
        "words": len(vocabulary),
        "sha256": vocabulary.hash,
    }
    checksums[store_lib.VOCABULARY] = Checksum.of_bytes(text.encode())
    manifest["files"] = integrity.checksums_to_json(checksums)
    store_lib.write_manifest(path, manifest)


def _check_same(
    store: Store,
    builder: tfds.core.DatasetBuilder,
    config: config_lib.Config,
    npy_dir: epath.PathLike | None,
    encoder_weights: str | None,
) -> None:
    """Raises StoreError if the store was made of another data set, weights or maps than the flags say."""
    path, source, made_by = store.path, store.manifest["source"], store.manifest["encoder"]
    remedy = "delete it, or choose another --data_dir"
    if source != builder.info.full_name:
        raise StoreError(f"{path}: found features of {source}, expected those of {builder.info.full_name}; {remedy}")
    # Maps may have moved: then those of the first image are the same.
    if npy_dir is not None and str(npy_dir) != made_by["imported_from"]:
        first = epath.Path(npy_dir) / f"{store.split('train').rows[0].filename}.npy"
        if not first.exists() or Checksum.of_file(first).sha256 != made_by["weights_sha256"]:
            origin = made_by["imported_from"]
            raise StoreError(f"{path}: found features imported from {origin}, expected those of {npy_dir}; {remedy}")
    # The store's name tells random weights from others, but not one file of weights from another.
    spec = encoder_weights or config.encoder.weights
    if "imported_from" not in made_by and spec not in ("imagenet", "random"):
        _, found = encoders.make(config.encoder).load(spec)
        if found != made_by["weights_sha256"]:
            by = made_by["weights_sha256"]
            raise StoreError(
                f"{path}: found features made by weights {by}, expected those of {spec} ({found}); {remedy}"
            )


def _extract(
    store: Store,
    config: config_lib.Config,
    encoder: ImageEncoder,
    builder: tfds.core.DatasetBuilder,
    npy_dir: epath.PathLike | None,
    num_workers: int,
    max_bad_fraction: float,
) -> None:
    """Computes or imports the features of all unfinished shards."""
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
            split.create_array(store.positions, store.feature_dim, config.encoder.store_dtype),
            load,
            encode,
            batch_size=extract.batch_size(config.encoder),
            at_once=extract.batches_at_once(),
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            name=f"features of {role}",
            known=renewal.known_features(store.path, role, split) if npy_dir is None else renewal.NOTHING_KNOWN,
        )


def _pixels(examples: Examples, preprocess: Preprocess, row: int) -> np.ndarray:
    image = examples[row].image
    if not image:
        raise decode.ImageError("the file is empty or missing")
    return decode.for_encoder(image, preprocess)


def _check_space(store: Store, config: config_lib.Config) -> None:
    """Prints the size of the features that are still missing. Raises WriteError if the disk is too small."""
    images = sum(len(store.split(r).shard(n)) for r in store.roles for n in store.split(r).unfinished())
    needed = images * store_lib.bytes_an_image(store.positions, store.feature_dim, config.encoder.store_dtype)
    what = f"features of {images} images"
    free = disk_space.check(store.path, needed, what, "free some space, or choose another --data_dir")
    print(f"{what}: {needed / 1e9:.2f} GB in {store.path}{f' ({free / 1e9:.1f} GB free)' if free is not None else ''}")


def _write_summary(store: Store) -> None:
    """Prints the numbers of images with and without features, and writes them into the manifest."""
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


def run(flags: types.SimpleNamespace, config: config_lib.Config, positional: list[str]) -> int:
    """Runs `flaxcap prepare` and returns its exit status."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # of downloads: tfds 4.9 also draws it into files
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
