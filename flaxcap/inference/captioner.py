"""A captioner at rest: loaded from a run or from an export, and written as one.

An export is a directory that needs nothing else:

    config.json  vocabulary.json  about.json   preset; words; where it comes from, preprocessing, checksums
    decoder/  encoder/                         parameters alone (Orbax)
"""

from flaxcap.models import decoder as decoder_lib
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

import flaxcap
from flaxcap import config as config_lib
from flaxcap import presets
from flaxcap.encoders.inception_v3 import network, weights
from flaxcap.errors import cut, quoted
from flaxcap.features import store
from flaxcap.files import integrity, size_limits
from flaxcap.files.params import CheckpointError, load_params, save_params
from flaxcap.images import decode
from flaxcap.models import recurrent
from flaxcap.models.decoder import ENCODER
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.training import finetune
from flaxcap.training.checkpoints import Checkpoints

PARAMS = ("decoder", "encoder")  # directories of an export
MAX_FEATURES = 1 << 16  # InceptionV3's are 2048 wide at most


class Captioner(NamedTuple):
    """Everything that turns a picture into words."""

    config: config_lib.Config
    vocabulary: Vocabulary
    bind: Any  # see model.create
    params: decoder_lib.Params
    encoder: network.Params  # unfolded
    about: dict
    others: tuple["Captioner", ...] = ()  # that decide with it: an ensemble

    @property
    def binds(self) -> tuple[decoder_lib.Bind, ...]:
        return (self.bind, *(other.bind for other in self.others))

    @property
    def all_params(self) -> tuple[decoder_lib.Params, ...]:
        return (self.params, *(other.params for other in self.others))


def load(
    *,
    workdir: epath.PathLike | None = None,
    model_dir: epath.PathLike | None = None,
    data_dir: epath.PathLike = "",
) -> Captioner:
    """The best checkpoint of a run, whose store is in `data_dir`, or an export. CheckpointError if it is not there."""
    if model_dir is not None:
        return _load_export(epath.Path(model_dir))
    if workdir is None:
        raise CheckpointError("no model is named: give --workdir=RUN or --model=EXPORT")
    return _load_run(epath.Path(workdir), data_dir)


def load_any(path: epath.PathLike, data_dir: epath.PathLike) -> Captioner:
    """A run or an export."""
    is_run = (epath.Path(path) / "checkpoints").exists()
    return load(workdir=path, data_dir=data_dir) if is_run else load(model_dir=path)


def encoder_of(prepared: store.Store, config: config_lib.Config) -> network.Params:
    """The network, unfolded, that made a store's features."""
    if (prepared.path / "encoder").exists():
        return load_params(prepared.path / "encoder")
    # Features made elsewhere: their encoder is taken to be the preset's.
    return weights.load(config.encoder.weights, block=config.encoder.block)[0]


def load_all(
    *, workdirs: Sequence[epath.PathLike] = (), model_dirs: Sequence[epath.PathLike] = (), data_dir: epath.PathLike = ""
) -> Captioner:
    """One captioner of all these runs and exports. CheckpointError unless they share words and features."""
    found = [load(model_dir=path) for path in model_dirs]
    found += [load(workdir=path, data_dir=data_dir) for path in workdirs]
    if not found:
        return load()
    first, *others = found
    for path, other in zip([*model_dirs, *workdirs][1:], others, strict=True):
        for name in ("vocabulary_sha256", "encoder_sha256", "feature_dim"):
            if other.about.get(name) != first.about.get(name):
                raise CheckpointError(
                    f"{path}: cannot decide together with {[*model_dirs, *workdirs][0]}: its {name} is"
                    f" {other.about.get(name)}, not {first.about.get(name)}"
                )
    return first._replace(others=tuple(others))


def read_config(directory: epath.PathLike) -> config_lib.Config:
    """The preset saved in a run or an export. ConfigError if it cannot be used."""
    file = epath.Path(directory) / "config.json"
    if not file.exists():
        raise CheckpointError(f"{directory}: no {file.name}: neither a run nor an export of flaxcap")
    config = presets.load(str(file))
    try:
        return config_lib.check(config)
    except config_lib.ConfigError as e:
        raise config_lib.ConfigError(f"{file}: {e}") from e


def _load_run(workdir: epath.Path, data_dir: epath.PathLike) -> Captioner:
    config = read_config(workdir)
    vocabulary = _vocabulary(workdir)
    prepared = store.Store(store.path_for(data_dir, config))
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(vocabulary), prepared.positions_vary))
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    step = checkpoints.best_step
    if step is None:
        raise CheckpointError(f"{workdir}: no checkpoint yet; `flaxcap train` makes them")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    encoder = encoder_of(prepared, config)
    like = jax.eval_shape(init, jax.random.key(0))
    if first := config.train.finetune.block:
        like[ENCODER] = finetune.split(encoder, first, config.encoder.block)[1]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    params = checkpoints.restore_params(like, step)
    checkpoints.close()
    made_by = prepared.manifest["encoder"]["weights_sha256"]
    if ENCODER in params:
        encoder, params = finetune.whole(encoder, jax.device_get(params))
        made_by = weights.digest(encoder)
    about = {
        "step": step,
        "dataset": config.dataset,
        "preprocessing": decode.PREPROCESSING,
        "encoder_sha256": made_by,
        "vocabulary_sha256": vocabulary.hash,
        "feature_dim": prepared.feature_dim,
        "flaxcap": flaxcap.__version__,
    }
    return Captioner(config, vocabulary, bind, params, encoder, about)


def _load_export(path: epath.Path) -> Captioner:
    _check_files(path)
    config = read_config(path)
    vocabulary = _vocabulary(path)
    file = path / "about.json"
    try:
        about = json.loads(size_limits.read(file, size_limits.PRESET))
        feature_dim, files = int(about["feature_dim"]), dict(about["files"])
        if not 0 < feature_dim <= MAX_FEATURES:
            raise ValueError(f"feature_dim is {cut(str(feature_dim))}, expected 1 to {MAX_FEATURES}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise CheckpointError(f"{file}: cannot be read ({e!r})") from e
    if about.get("preprocessing") != decode.PREPROCESSING:
        raise CheckpointError(
            f"{file}: trained with pictures prepared as {quoted(about.get('preprocessing'))}, this version"
            f" prepares them as {decode.PREPROCESSING!r}"
        )
    if about.get("vocabulary_sha256") != vocabulary.hash:
        raise CheckpointError(f"{path / 'vocabulary.json'}: not the vocabulary that the model was trained with")
    for name, digest in files.items():
        if (
            not integrity.is_inside(name)
            or not (path / name).exists()
            or integrity.of_file(path / name).sha256 != digest
        ):
            raise CheckpointError(f"{path / name}: missing, or not as it was written; copy the export again")
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(64, feature_dim, len(vocabulary)))
    decoder = _params(path / "decoder", jax.eval_shape(init, jax.random.key(0)))
    shapes = network.kernel_shapes(config.encoder.block).items()
    norm = ("beta", "mean", "var")
    layers = {name: {"kernel": np.empty(shape)} | {n: np.empty(shape[3]) for n in norm} for name, shape in shapes}
    encoder = _params(path / "encoder", layers)
    return Captioner(config, vocabulary, bind, decoder, encoder, about)


def _params(path: epath.Path, expected: Any) -> Any:
    """The parameters saved there. CheckpointError if their names or shapes are not the expected ones."""
    return load_params(path, expected)


def _check_files(path: epath.Path) -> None:
    """CheckpointError if an export holds devices, links that lead out of it, or more than `limits.EXPORT`."""
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


def write(captioner: Captioner, out: epath.PathLike) -> None:
    """An export of one captioner. CheckpointError if `out` holds something already, but for an export cut off."""
    path = epath.Path(out)
    ours = re.compile(rf"\.?({'|'.join((*PARAMS, 'vocabulary', 'about'))})(\.json)?(\.part|\.orbax-checkpoint-tmp.*)?")
    if path.exists() and (not path.is_dir() or not all(ours.fullmatch(file.name) for file in path.iterdir())):
        raise CheckpointError(f"--out={out}: not empty; an export goes to a new directory")
    path.mkdir(parents=True, exist_ok=True)
    for name, params in zip(PARAMS, (captioner.params, captioner.encoder), strict=True):
        save_params(path / name, params)
    # Each is the sum of all sums of its directory.
    files = {name: integrity.of_file(path / name).sha256 for name in (f"{d}/{integrity.SUMS}" for d in PARAMS)}
    about = json.dumps(captioner.about | {"files": files}, indent=2) + "\n"
    integrity.write_whole(path / "vocabulary.json", captioner.vocabulary.to_json())
    integrity.write_whole(path / "about.json", about)
    # Last: what has a config.json is whole.
    integrity.write_whole(path / "config.json", presets.to_json(captioner.config))
