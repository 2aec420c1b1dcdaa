"""Repair of a store: writes damaged or missing files again, and leaves the others as they are."""

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from flaxcap import config as config_lib
from flaxcap.data.base import Examples
from flaxcap.features import build, store
from flaxcap.features.shards import ARRAY, CAPTIONS, Split, StoreError, captions_text
from flaxcap.files import integrity
from flaxcap.files.integrity import Checksum, DamagedError
from flaxcap.files.params import save_params
from flaxcap.images import decode
from flaxcap.images.preprocess import Preprocess


def restore_manifest(path: epath.Path) -> None:
    """Replaces a damaged or missing manifest by its copy, if there is a sound one."""
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


def repair(found: store.Store, config: config_lib.Config, builder: tfds.core.DatasetBuilder) -> dict[str, Checksum]:
    """Writes damaged or missing captions and array descriptions again.

    A shard whose record is damaged, or whose file is missing or truncated, becomes unfinished.

    Args:
      found: the store.
      config: the preset.
      builder: the data set that the store was made of.

    Returns:
      The checksums of captions and array descriptions.

    Raises:
      StoreError: the data set is not the one that the store was made of.
    """
    checksums = {}
    for role in found.roles:
        split = found.split(role)
        checksums[f"{role}/{CAPTIONS}"] = _repair_captions(split, found, role, config, builder)
        checksums[f"{role}/{ARRAY}"] = _repair_array(split, found, role, config)
        for number in split.finished():
            try:
                split.check_shard(number)
            except (DamagedError, StoreError) as e:
                where = "" if isinstance(e, StoreError) else f"{split.shard_file(number)}: "
                print(f"{where}{e}; shard {number} of {role} is computed again")
                split.mark_unfinished(number)
    return checksums


def _repair_captions(
    split: Split, found: store.Store, role: str, config: config_lib.Config, builder: tfds.core.DatasetBuilder
) -> Checksum:
    file, expected = split.path / CAPTIONS, found.checksums[f"{role}/{CAPTIONS}"]
    try:
        integrity.check(file, expected)
    except DamagedError as e:
        print(f"{file}: {e}; it is written again")
        examples = Examples(builder, found.manifest["splits"][role]["split"])
        text = captions_text(build.read_rows(examples, config.data, f"captions of {role}"))
        if Checksum.of_bytes(text.encode()) != expected:
            raise StoreError(
                f"{file}: {e}; found other captions in the data set, expected those of the store; delete {found.path},"
                " or choose another --data_dir"
            ) from e
        integrity.write_atomically(file, text)
    return expected


def _repair_array(split: Split, found: store.Store, role: str, config: config_lib.Config) -> Checksum:
    file = split.path / ARRAY
    try:
        integrity.check(file, found.checksums[f"{role}/{ARRAY}"])
    except DamagedError as e:
        print(f"{file}: {e}; it is written again")
        file.unlink(missing_ok=True)
    split.create_array(found.positions, found.feature_dim, config.encoder.store_dtype)
    return Checksum.of_file(file)


def retry_skipped(found: store.Store, builder: tfds.core.DatasetBuilder, preprocess: Preprocess) -> None:
    """Marks shards unfinished that skipped an image which can be read now, such as one of a newly supported format.

    Args:
      found: the store.
      builder: the data set that the store was made of.
      preprocess: of the encoder.
    """
    if "imported_from" in found.manifest["encoder"]:
        return
    for role in found.roles:
        split = found.split(role)
        examples = Examples(builder, found.manifest["splits"][role]["split"])
        for skipped in split.skipped():
            try:
                decode.for_encoder(examples[skipped.row].image, preprocess)
            except decode.ImageError:
                continue
            print(f"{skipped.filename}: was skipped ({skipped.reason}), can be read now")
            split.mark_unfinished(skipped.row // split.shard_rows)


def repair_encoder(
    found: store.Store, config: config_lib.Config, builder: tfds.core.DatasetBuilder, encoder_weights: str | None
) -> None:
    """Writes the encoder's parameters again if a file of them is damaged or missing.

    Args:
      found: the store.
      config: the preset.
      builder: the data set, for random weights.
      encoder_weights: a file that replaces the preset's weights.

    Raises:
      StoreError: the weights are not those that made the features.
    """
    if "imported_from" in found.manifest["encoder"]:
        return
    directory, expected = found.path / store.ENCODER_DIR, found.manifest["encoder"]["weights_sha256"]
    damage = next(integrity.find_damage(directory), None)
    if damage is None:
        return
    file, what = damage
    print(f"{file}: {what}; the encoder's parameters are written again")
    params, digest = build.read_encoder(config, builder, encoder_weights)
    if digest != expected:
        raise StoreError(
            f"{file}: {what}; found weights {digest}, expected {expected}, which made the features; name their file"
            " with --encoder_weights"
        )
    save_params(directory, params)
