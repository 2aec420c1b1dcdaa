"""Captioners from runs and exports."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

import flaxcap
from flaxcap import config as config_lib
from flaxcap import presets
from flaxcap.encoders import base as encoders
from flaxcap.encoders.base import ImageEncoder
from flaxcap.errors import cut, quoted
from flaxcap.features import store
from flaxcap.files import integrity, size_limits
from flaxcap.files.params import CheckpointError, load_params
from flaxcap.images import decode
from flaxcap.inference.captioner import Captioner
from flaxcap.models import decoder as decoder_lib
from flaxcap.models.decoder import ENCODER, Sizes
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.training import finetune
from flaxcap.training.checkpoints import Checkpoints

# The members of an ensemble are equal in these.
_SHARED = (
    "vocabulary_sha256",
    "encoder",
    "encoder_sha256",
    "preprocessing",
    "positions",
    "positions_vary",
    "feature_dim",
)
MAX_SIZE = 1 << 16  # of positions and features: an export may come from a stranger


def load(path: epath.PathLike, *, data_dir: epath.PathLike = "data") -> Captioner:
    """Returns the captioner of a run (its best checkpoint) or of an export.

    Args:
      path: the directory of the run or of the export.
      data_dir: where the prepared features of a run are; an export needs none.

    Raises:
      CheckpointError: there is no run or export, or a file of it is missing or damaged.
      ConfigError: its preset cannot be used.
    """
    is_run = (epath.Path(path) / "checkpoints").exists()
    return load_run(path, data_dir) if is_run else load_export(path)


def load_ensemble(
    *, workdirs: Sequence[epath.PathLike] = (), model_dirs: Sequence[epath.PathLike] = (), data_dir: epath.PathLike = ""
) -> Captioner:
    """Returns one captioner for all these runs and exports.

    Args:
      workdirs: runs.
      model_dirs: exports.
      data_dir: where the prepared features of the runs are.

    Raises:
      CheckpointError: none is named, or they differ in vocabulary or features.
    """
    found = [load_export(path) for path in model_dirs] + [load_run(path, data_dir) for path in workdirs]
    if not found:
        raise CheckpointError("no model is named: give --workdir=RUN or --model=EXPORT")
    first, *others = found
    for path, other in zip([*model_dirs, *workdirs][1:], others, strict=True):
        for name in _SHARED:
            if other.about.get(name) != first.about.get(name):
                raise CheckpointError(
                    f"{path}: no ensemble with {[*model_dirs, *workdirs][0]}: found {name} {other.about.get(name)},"
                    f" expected {first.about.get(name)}"
                )
    return dataclasses.replace(first, others=tuple(others)) if others else first


def read_config(directory: epath.PathLike) -> config_lib.Config:
    """Returns the preset saved in a run or an export.

    Raises:
      CheckpointError: the directory holds neither.
      ConfigError: the preset cannot be used.
    """
    file = epath.Path(directory) / "config.json"
    if not file.exists():
        raise CheckpointError(f"{directory}: no {file.name}: neither a run nor an export of flaxcap")
    config = presets.load(str(file))
    try:
        return config_lib.check(config)
    except config_lib.ConfigError as e:
        raise config_lib.ConfigError(f"{file}: {e}") from e


class StoreEncoder(NamedTuple):
    """The encoder of a store."""

    encoder: ImageEncoder
    params: encoders.Params | None  # None: the features were imported
    sha256: str | None


def encoder_of(prepared: store.Store, config: config_lib.Config) -> StoreEncoder:
    """Returns the encoder that made a store's features."""
    made_by = prepared.manifest["encoder"]
    params = None if "imported_from" in made_by else load_params(prepared.path / store.ENCODER_DIR)
    return StoreEncoder(encoders.make(config.encoder), params, made_by["weights_sha256"])


def load_run(workdir: epath.PathLike, data_dir: epath.PathLike) -> Captioner:
    """Returns the captioner of a run's best checkpoint; see `load`."""
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    vocabulary = _vocabulary(workdir)
    prepared = store.Store(store.path_for(data_dir, config))
    sizes = Sizes(prepared.positions, prepared.feature_dim, len(vocabulary), prepared.positions_vary)
    bind, init = decoder_lib.create(config, sizes)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    step = checkpoints.best_step
    if step is None:
        raise CheckpointError(f"{workdir}: no checkpoint yet; `flaxcap train` writes them")
    encoder, encoder_params, sha256 = encoder_of(prepared, config)
    like = jax.eval_shape(init, jax.random.key(0))
    if (first := config.train.finetune.block) and encoder_params is not None:
        like[ENCODER] = encoder.split(encoder_params, first)[1]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    params = checkpoints.restore_params(like, step)
    checkpoints.close()
    if ENCODER in params and encoder_params is not None:
        encoder_params, params = finetune.merge(encoder_params, jax.device_get(params))
        sha256 = encoders.digest(encoder_params)
    about = {
        "step": step,
        "dataset": config.dataset,
        "encoder": encoder.name,
        "preprocessing": decode.describe(encoder.preprocess),
        "encoder_sha256": sha256,
        "imported_from": prepared.manifest["encoder"].get("imported_from"),
        "vocabulary_sha256": vocabulary.hash,
        "positions": sizes.positions,
        "positions_vary": sizes.positions_vary,
        "feature_dim": sizes.features,
        "flaxcap": flaxcap.__version__,
    }
    return Captioner(config, vocabulary, bind, params, encoder, encoder_params, about)


def load_export(path: epath.PathLike) -> Captioner:
    """Returns the captioner of an export; see `load`."""
    path = epath.Path(path)
    _check_files(path)
    config = read_config(path)
    vocabulary = _vocabulary(path)
    encoder = encoders.make(config.encoder)
    about, sizes = _read_about(path / "about.json", len(vocabulary))
    expected = decode.describe(encoder.preprocess)
    if about.get("preprocessing") != expected:
        raise CheckpointError(
            f"{path / 'about.json'}: found preprocessing {quoted(about.get('preprocessing'))}, expected {expected}"
        )
    if about.get("vocabulary_sha256") != vocabulary.hash:
        raise CheckpointError(f"{path / 'vocabulary.json'}: not the vocabulary that the model was trained with")
    for name, digest in about["files"].items():
        file = path / name
        if not integrity.is_inside(name) or not file.exists() or integrity.Checksum.of_file(file).sha256 != digest:
            raise CheckpointError(f"{file}: missing, or not as it was written; copy the export again")
    bind, init = decoder_lib.create(config, sizes)
    params = load_params(path / "decoder", jax.eval_shape(init, jax.random.key(0)))
    encoder_params = None
    if config.encoder.name != encoders.IMPORTED:
        encoder_params = load_params(path / ENCODER, encoder.abstract_params())
        if (sizes.positions, sizes.features, sizes.positions_vary) != (encoder.positions, encoder.features, False):
            raise CheckpointError(
                f"{path / 'about.json'}: found {sizes.positions} positions of {sizes.features} features,"
                f" expected {encoder.positions} of {encoder.features}, which {encoder.name} gives"
            )
    return Captioner(config, vocabulary, bind, params, encoder, encoder_params, about)


def _read_about(file: epath.Path, vocabulary: int) -> tuple[dict[str, Any], Sizes]:
    try:
        about = json.loads(size_limits.read(file, size_limits.PRESET))
        for name in ("positions", "feature_dim"):
            if not 0 < int(about[name]) <= MAX_SIZE:
                raise ValueError(f"{name} is {cut(str(about[name]))}, expected 1 to {MAX_SIZE}")
        sizes = Sizes(int(about["positions"]), int(about["feature_dim"]), vocabulary, bool(about["positions_vary"]))
        shape = {"positions": sizes.positions, "feature_dim": sizes.features, "positions_vary": sizes.positions_vary}
        return about | shape | {"imported_from": about["imported_from"], "files": dict(about["files"])}, sizes
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise CheckpointError(f"{file}: cannot be read ({e!r})") from e


def _check_files(path: epath.Path) -> None:
    """Raises CheckpointError if an export holds devices, links out of it, or more than `size_limits.EXPORT` bytes."""
    if integrity.is_remote(path):
        return
    root, size = os.path.realpath(path), 0
    for folder, _, names in os.walk(path):
        for file in (os.path.join(folder, name) for name in names):
            real = os.path.realpath(file)
            if not os.path.isfile(real) or os.path.commonpath([root, real]) != root:
                raise CheckpointError(f"{file}: found a link or a device, expected a file (`cp -rL` makes one)")
            size += os.path.getsize(real)
    if size > size_limits.EXPORT:
        raise CheckpointError(f"{path}: found {size} bytes, expected at most {size_limits.EXPORT}")


def _vocabulary(directory: epath.Path) -> Vocabulary:
    file = directory / "vocabulary.json"
    try:
        return Vocabulary.from_json(size_limits.read(file, size_limits.VOCABULARY).decode(), str(file))
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{file}: cannot be read ({e})") from e
