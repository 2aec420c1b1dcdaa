"""A store that is there, mended: what is damaged or gone is made anew, and nothing else."""

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from flaxcap import config as config_lib
from flaxcap.data.base import Examples
from flaxcap.features import build, store
from flaxcap.features.shards import ARRAY, CAPTIONS, Split, StoreError, captions_text
from flaxcap.files import integrity
from flaxcap.files.integrity import DamagedError, Sum
from flaxcap.files.params import save_params


def restore_manifest(path: epath.Path) -> None:
    """Puts the copy of the manifest in its place if that is damaged or gone."""
    file, copy = path / store.MANIFEST, path / store.COPY
    try:
        if file.exists():
            store.read_manifest(file)
            return
    except (OSError, ValueError, RecursionError) as e:
        logging.warning("%s: %s", file, e)
    try:
        manifest = store.read_manifest(copy)
    except (OSError, ValueError, RecursionError):
        return
    print(f"{file}: restored from {copy.name}")
    store.write_manifest(path, manifest)


def mend(
    found: store.Store, config: config_lib.Config, builder: tfds.core.DatasetBuilder, encoder_weights: str | None
) -> dict[str, Sum]:
    """Makes anew what is damaged or gone; the sums of captions and arrays.

    Shards that are seen to be damaged without reading them become unfinished ones. StoreError if the data set or the
    weights at hand are not those that the store was made of.
    """
    sums = {}
    for role in found.roles:
        split = found.split(role)
        sums[f"{role}/{CAPTIONS}"] = _mend_captions(split, found, role, config, builder)
        sums[f"{role}/{ARRAY}"] = _mend_array(split, found, role, config)
        for number in split.finished():
            try:
                split.check_shard(number)
            except (DamagedError, StoreError) as e:
                where = "" if isinstance(e, StoreError) else f"{split.shard_file(number)}: "
                print(f"{where}{e}; shard {number} of {role} is made anew")
                split.undo(number)
    if "imported_from" not in found.manifest["encoder"]:
        _mend_encoder(found, config, builder, encoder_weights)
    return sums


def _mend_captions(
    split: Split, found: store.Store, role: str, config: config_lib.Config, builder: tfds.core.DatasetBuilder
) -> Sum:
    file, expected = split.path / CAPTIONS, found.sums[f"{role}/{CAPTIONS}"]
    try:
        integrity.check(file, expected)
    except DamagedError as e:
        print(f"{file}: {e}; it is made anew")
        examples = Examples(builder, found.manifest["splits"][role]["split"])
        text = captions_text(build.read_rows(examples, config.data, f"captions of {role}"))
        if integrity.of_bytes(text.encode()) != expected:
            raise StoreError(
                f"{file}: {e}, and the data set has other captions now; delete {found.path}, or take another --data_dir"
            ) from e
        integrity.write_whole(file, text)
    return expected


def _mend_array(split: Split, found: store.Store, role: str, config: config_lib.Config) -> Sum:
    file = split.path / ARRAY
    try:
        integrity.check(file, found.sums[f"{role}/{ARRAY}"])
    except DamagedError as e:
        print(f"{file}: {e}; it is made anew")
        file.unlink(missing_ok=True)
    split.create_array(found.positions, found.feature_dim, config.encoder.store_dtype)
    return integrity.of_file(file)


def _mend_encoder(
    found: store.Store, config: config_lib.Config, builder: tfds.core.DatasetBuilder, encoder_weights: str | None
) -> None:
    directory, made_by = found.path / store.ENCODER_DIR, found.manifest["encoder"]["weights_sha256"]
    damage = next(integrity.damages(directory), None)
    if damage is None:
        return
    where, what = damage
    print(f"{where}: {what}; the encoder is written anew")
    params, digest = build.read_encoder(config, builder, encoder_weights)
    if digest != made_by:
        raise StoreError(
            f"{where}: {what}, and the weights at hand ({digest}) are not those that made the features ({made_by});"
            " name these with --encoder_weights"
        )
    save_params(directory, params)
