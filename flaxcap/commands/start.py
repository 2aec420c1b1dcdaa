"""What a run starts from: its workdir, its parameters, and the encoder where that is trained too."""

import jax
import jax.numpy as jnp
from etils import epath

from flaxcap import presets
from flaxcap.config import Config, ConfigError, difference
from flaxcap.data import datasets
from flaxcap.data.base import Examples
from flaxcap.features import store
from flaxcap.files import integrity
from flaxcap.files.params import check_shapes
from flaxcap.inference import loading
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import word_vectors
from flaxcap.models.decoder import ENCODER
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.training import finetune
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.finetune import FEATURES, Stage
from flaxcap.training.state import TrainState


def claim(workdir: epath.Path, config: Config, vocabulary: Vocabulary, resume: bool) -> None:
    """Makes the workdir this run's. ConfigError if it is another's, or is not to be gone on with."""
    file, words = workdir / "config.json", workdir / "vocabulary.json"
    if file.exists():
        if not resume:
            raise ConfigError(f"--noresume, but --workdir={workdir} holds a run; take another, or delete it")
        old = presets.load(str(file))
        changed = difference(old, config, "run")
        if config.train.cider_epochs and old.train.epochs != config.train.epochs:  # self-critical training begins there
            changed.append(f"train.epochs was {old.train.epochs}, is {config.train.epochs}")
        if changed:
            raise ConfigError(
                f"--workdir={workdir} holds a run of another preset: {'; '.join(changed)}; take another --workdir"
            )
        if Vocabulary.from_json(words.read_text(), str(words)).hash != vocabulary.hash:
            raise ConfigError(f"--workdir={workdir} holds a run with another vocabulary; take another --workdir")
    if jax.process_index() == 0:
        (workdir / integrity.CHECKSUMS).unlink(missing_ok=True)
        integrity.write_atomically(words, vocabulary.to_json())
        integrity.write_atomically(file, presets.to_json(config))
        integrity.write_checksums(workdir, (file.name, words.name))


def stage(config: Config, prepared: store.Store, data_dir: epath.PathLike, init_from: epath.PathLike | None) -> Stage:
    """Pictures and the encoder of the store, or of `init_from`, where it is fine-tuned; else nothing."""
    options = config.train.finetune
    if not options.block:
        return FEATURES
    encoder, params, _ = loading.encoder_of(prepared, config)
    if init_from:
        params = loading.load(init_from, data_dir=data_dir).encoder_params
    if options.block not in encoder.stages or params is None:
        raise ConfigError(
            f"--config.train.finetune.block={options.block}: expected one of {', '.join(encoder.stages) or 'none'},"
            f" where the encoder {encoder.name} can be fine-tuned"
        )
    frozen, trained = encoder.split(params, options.block)
    builder = datasets.prepare_for(config, data_dir)
    sources = {}
    for role in ("train", "val"):
        examples = Examples(builder, prepared.manifest["splits"][role]["split"])
        images = prepared.split(role).images
        sources[role] = finetune.Pictures(lambda row, e=examples: e[row].image, images, encoder.preprocess)
    encode = finetune.make_encode(encoder, config.encoder, options)
    return Stage(sources, frozen, {ENCODER: trained}, encode)


def state(
    fresh: TrainState,
    checkpoints: Checkpoints,
    init_from: epath.PathLike | None,
    config: Config,
    vocabulary: Vocabulary,
    data_dir: epath.PathLike,
) -> tuple[TrainState, dict]:
    """The state to start from, and the saved progress: DESIGN's restore order."""
    if checkpoints.latest_step is not None:
        state, progress = checkpoints.restore(fresh)
        print(f"going on at step {int(state.step)}")
        return state, progress
    if init_from is not None:
        params = loading.load(init_from, data_dir=data_dir).params
        if ENCODER in fresh.params:  # already that of --init_from, see `stage`
            params = params | {ENCODER: fresh.params[ENCODER]}
        check_shapes(f"--init_from={init_from}", params, fresh.params)
    elif config.model.embeddings:
        params = jax.device_get(fresh.params)
        vectors = word_vectors.read(config.model.embeddings, vocabulary, config.model.embedding_dim)
        params = decoder_lib.find(config.model.name).with_word_vectors(params, vectors)
        print(f"{len(vectors)} of {len(vocabulary)} words start with vectors of {config.model.embeddings}")
    else:
        return fresh, {}

    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    # A copy: the step is given both, and takes their memory.
    average = None if fresh.average is None else jax.tree.map(jnp.copy, put)
    return fresh._replace(params=put, average=average), {}
