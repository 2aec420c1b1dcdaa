"""`flaxcap train`: joins the store, the feed, the model and the optimizer, and trains."""

import json
import os
import sys
import types

import jax
import jax.numpy as jnp
from etils import epath

from flaxcap import presets
from flaxcap.commands import FAILED, PREEMPTED
from flaxcap.config import Config, ConfigError, difference
from flaxcap.data import copies, datasets
from flaxcap.data.base import Examples
from flaxcap.decoding import generate
from flaxcap.features import store
from flaxcap.files import integrity, locks
from flaxcap.files.params import check_shapes
from flaxcap.inference import loading, plots
from flaxcap.input_pipeline.batching import Plan
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import word_vectors
from flaxcap.models.decoder import ENCODER
from flaxcap.runtime import device_memory, devices, multihost, sharding
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.training import checkpoints as checkpoints_lib
from flaxcap.training import finetune, logs, self_critical, validation
from flaxcap.training import step as step_lib
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.compiled_step import CompiledStep
from flaxcap.training.finetune import TrainingSource
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import TrainState, init_state
from flaxcap.training.trainer import LostError, Preempted, RunParts, Trainer, timeline


def train(
    config: Config,
    workdir: epath.PathLike,
    data_dir: epath.PathLike,
    *,
    resume: bool = True,
    init_from: epath.PathLike | None = None,
    profile_dir: epath.PathLike | None = None,
    max_bad_steps: int = 10,
) -> float:
    """Trains to the preset's last epoch and returns the best validation score.

    The score is the CIDEr of generated captions. Where that cannot rise, it is minus the validation loss.
    The run starts from the newest checkpoint in `workdir`. Without one it starts from the parameters of `init_from`.
    Without both it starts from random parameters.

    Args:
      config: the preset.
      workdir: receives checkpoints, logs and plots.
      data_dir: holds the prepared store.
      resume: False: a run in `workdir` is an error.
      init_from: a run or an export whose parameters start the run.
      profile_dir: receives a trace of a few steps, for XProf; None: no trace.
      max_bad_steps: a step whose loss or gradient is not finite is skipped; this many in a row end the run.

    Raises:
      ConfigError: `workdir` holds another run, or a batch does not fit into memory.
      LockError: another process trains in `workdir`.
      Preempted: a SIGTERM arrived; a checkpoint is saved.
      NotFiniteError: `max_bad_steps` steps in a row were not finite.
      LostError: another process of the run is gone.
    """
    workdir, config = epath.Path(workdir), store.resolve(data_dir, config)
    prepared = store.Store.finished(data_dir, config)
    with locks.held(workdir):
        _claim(workdir, config, prepared, resume)
        source = _training_source(config, prepared, data_dir, init_from)
        parts, fresh = _join(config, workdir, prepared, source)
        if notice := parts.validate.notice():
            print(notice)
        state, progress = _first_state(fresh, parts.checkpoints, init_from, config, prepared.vocabulary(), data_dir)
        if int(state.step) < timeline(config.train, parts.plan).total:
            _check_memory(config, parts)
        return Trainer(parts, state, progress, max_bad_steps=max_bad_steps, profile_dir=profile_dir).run()


def _claim(workdir: epath.Path, config: Config, prepared: store.Store, resume: bool) -> None:
    """Writes the preset, the vocabulary and the digests of the data into the workdir.

    Raises:
      ConfigError: the workdir holds another run, or any run if `resume` is False.
    """
    file, words, data = (workdir / name for name in ("config.json", "vocabulary.json", "data.json"))
    vocabulary, digests = prepared.vocabulary(), json.dumps(prepared.digests(), indent=2) + "\n"
    where = f"--workdir={workdir}: holds a run"
    if file.exists():
        if not resume:
            raise ConfigError(f"{where}, expected none with --noresume; choose another directory or delete it")
        old = presets.load(str(file))
        changed = difference(old, config, "run")
        # Self-critical training begins at this epoch.
        if config.train.cider_epochs and old.train.epochs != config.train.epochs:
            changed.append(f"train.epochs was {old.train.epochs}, is {config.train.epochs}")
        if changed:
            raise ConfigError(f"{where} of another preset: {'; '.join(changed)}; choose another directory")
        if Vocabulary.from_json(words.read_text(), str(words)).hash != vocabulary.hash:
            raise ConfigError(f"{where} with another vocabulary; choose another directory")
        if data.exists() and data.read_text() != digests:
            raise ConfigError(
                f"{where} that was trained on other images or captions than those in {prepared.path}; choose another"
                f" directory, where --init_from={workdir} starts with this run's parameters"
            )
    if jax.process_index() == 0:
        (workdir / integrity.CHECKSUMS).unlink(missing_ok=True)
        integrity.write_atomically(words, vocabulary.to_json())
        integrity.write_atomically(data, digests)
        integrity.write_atomically(file, presets.to_json(config))
        integrity.write_checksums(workdir, (file.name, words.name, data.name))


def _training_source(
    config: Config, prepared: store.Store, data_dir: epath.PathLike, init_from: epath.PathLike | None
) -> TrainingSource:
    """Returns the store's features, or with `train.finetune` the images and the encoder.

    Args:
      config: the preset.
      prepared: the store.
      data_dir: holds the images.
      init_from: a run or an export whose encoder is trained; None: the encoder of the store.

    Raises:
      ConfigError: the encoder cannot be fine-tuned from `train.finetune.block`.
    """
    options = config.train.finetune
    if not options.block:
        return finetune.FROM_STORE
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
    if copies.fingerprint(builder) != prepared.manifest["fingerprint"]:
        raise ConfigError(
            f"{builder.data_dir}: found other images than those of {prepared.path}; run `flaxcap prepare`"
        )
    sources = {}
    for role in ("train", "val"):
        examples = Examples(builder, prepared.manifest["splits"][role]["split"])
        images = prepared.split(role).images
        sources[role] = finetune.ImageSource(lambda row, e=examples: e[row].image, images, encoder.preprocess)
    encode = finetune.make_encode(encoder, config.encoder, options)
    return TrainingSource(sources, frozen, {ENCODER: trained}, encode)


def _join(
    config: Config, workdir: epath.Path, prepared: store.Store, source: TrainingSource
) -> tuple[RunParts, TrainState]:
    """Returns the parts of a run, and a state with random parameters."""
    vocabulary, split = prepared.vocabulary(), prepared.split("train")
    mesh, images = sharding.make_mesh(), source.sources.get("train")
    batches = config.train.steps_per_dispatch
    plan, feed = validation.make_feed(config, split, vocabulary, mesh, batches, images, source.frozen)
    _print_plan(plan, feed, mesh.size)
    sizes = decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(vocabulary), prepared.positions_vary)
    bind, init = decoder_lib.create(config, sizes)
    _, first_stage, total = timeline(config.train, plan)
    schedule = learning_rate(config.train, first_stage, total - first_stage)
    optimizer = make_optimizer(config.train)
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, first_stage, source.encode)
    eval_step = step_lib.make_eval_step(bind, mesh, config.train, source.encode)
    generator = generate.Generator(bind, config.decode, vocabulary)
    validate = validation.Validation(config, prepared.split("val"), vocabulary, mesh, generator, eval_step, source)
    if validate.unit != "words":
        print(f"CIDEr counts {validate.unit}: the validation captions have no spaces between words")
    multihost.first_does(lambda: checkpoints_lib.repair(workdir / "checkpoints"))
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    state = init_state(init, optimizer, config.seed, mesh, config.train.ema, source.trained)
    critical = None
    if config.train.cider_epochs:
        captions = [row.captions for row in split.rows]
        sample = self_critical.SelfCritical(bind, config, mesh, feed, vocabulary, captions)
        critical_step = self_critical.make_train_step(bind, optimizer, schedule, mesh, config.train)
        critical = sample, CompiledStep(critical_step, state, feed)
    parts = RunParts(
        config=config.train,
        workdir=workdir,
        split=split,
        plan=plan,
        feed=feed,
        compiled=CompiledStep(train_step, state, feed),
        self_critical=critical,
        validate=validate,
        checkpoints=checkpoints,
        after_epoch=lambda: _plot(workdir),
    )
    return parts, state


def _first_state(
    fresh: TrainState,
    checkpoints: Checkpoints,
    init_from: epath.PathLike | None,
    config: Config,
    vocabulary: Vocabulary,
    data_dir: epath.PathLike,
) -> tuple[TrainState, dict]:
    """Returns the state to start from, and the progress saved with it; {}: a new run.

    The newest checkpoint comes before `init_from`, and `init_from` before word vectors.

    Args:
      fresh: state with random parameters; gives shapes and shardings.
      checkpoints: of the run.
      init_from: a run or an export; None: none.
      config: the preset; `model.embeddings` names a file of word vectors.
      vocabulary: of the store.
      data_dir: holds the store, which `init_from` may need.

    Raises:
      CheckpointError: parameters do not fit the preset.
    """
    if checkpoints.latest_step is not None:
        state, progress = checkpoints.restore(fresh)
        print(f"resumes at step {int(state.step)}")
        return state, progress
    if init_from is not None:
        params = loading.load(init_from, data_dir=data_dir).params
        if ENCODER in fresh.params:  # `_training_source` took it from `init_from`
            params = params | {ENCODER: fresh.params[ENCODER]}
        check_shapes(f"--init_from={init_from}", params, fresh.params)
    elif config.model.embeddings:
        params = jax.device_get(fresh.params)
        vectors = word_vectors.read(config.model.embeddings, vocabulary, config.model.embedding_dim)
        params = decoder_lib.find(config.model.name).with_word_vectors(params, vectors)
        print(f"{config.model.embeddings}: initial embeddings of {len(vectors)} of {len(vocabulary)} words")
    else:
        return fresh, {}
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    # The step donates both: they must not share memory.
    average = None if fresh.average is None else jax.tree.map(jnp.copy, placed)
    return fresh._replace(params=placed, average=average), {}


def _print_plan(plan: Plan, feed: Feed, device_count: int) -> None:
    print(
        f"{plan.num_captions} training captions, {plan.steps_per_epoch} steps an epoch, padded to"
        f" {', '.join(map(str, plan.buckets))} tokens ({plan.padding:.0%} padding);"
        f" features {'on the device' if feed.resident else 'streamed'}; {device_count} devices"
    )


def _check_memory(config: Config, parts: RunParts) -> None:
    """Prints the memory that a step needs.

    Raises:
      ConfigError: a device has less.
    """
    need = parts.compiled.check_memory(config.train.batch_images, int(parts.plan.buckets[-1]))
    capacity = device_memory.capacity(jax.local_devices())
    print(f"a step takes up to {device_memory.megabytes(need)} of a device's {device_memory.megabytes(capacity)}")


def _plot(workdir: epath.Path) -> None:
    if jax.process_index() == 0:
        with (workdir / "loss.png").open("wb") as f:
            plots.loss_plot(logs.read(workdir), f)


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap train` and returns its exit status."""
    if not flags.distributed:
        devices.share_cores(config.train.batch_images, step_lib.CPU_IMAGES)
    try:
        train(
            config,
            flags.workdir,
            flags.data_dir,
            resume=flags.resume,
            init_from=flags.init_from,
            profile_dir=flags.profile_dir,
            max_bad_steps=flags.max_bad_steps,
        )
    except Preempted as e:
        print(f"flaxcap train: {e}")
        return PREEMPTED
    except LostError as e:
        print(f"flaxcap train: {e}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # a normal exit calls jax.distributed.shutdown, which waits for the lost process
    return 0
