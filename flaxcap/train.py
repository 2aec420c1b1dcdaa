"""`flaxcap train`: the loop. Everything it does to arrays is in train_step, everything it reads in feed."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from flaxcap import (
    checkpoint,
    checksums,
    data,
    decode,
    embeddings,
    export,
    finetune,
    lock,
    logs,
    loop,
    memory,
    model,
    plots,
    presets,
    processes,
    self_critical,
    store,
    validation,
)
from flaxcap import train_step as step_lib
from flaxcap.batches import Plan
from flaxcap.checkpoint import Checkpoints, check_shapes
from flaxcap.config import Config, ConfigError
from flaxcap.errors import UserError
from flaxcap.feed import FEATURES, Stage
from flaxcap.model import ENCODER
from flaxcap.text import Vocabulary

# What a run cannot change on its way: the meaning of its parameters, and of its steps.
FIXED = (
    *("dataset", "seed", "data", "encoder", "model"),
    *("train.batch_images", "train.captions_per_image", "train.num_buckets", "train.steps_per_dispatch", "train.ema"),
)


class Preempted(Exception):
    """The run was told to end (SIGTERM), has saved, and wants to be started again."""


class LostError(UserError):
    """Another process of the run has gone: nothing that waits for it may be called any more."""


class NotFiniteError(UserError):
    """The run cannot go on: its loss or gradient is not finite, step after step."""


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
    """Trains to the preset's last epoch and returns the best validation score (CIDEr of the model's own captions).

    It starts from the newest checkpoint in `workdir`, else from the parameters of the export `init_from`, else
    from scratch, always in this order. A step whose loss or gradient is not finite is skipped; NotFiniteError after
    `max_bad_steps` of them in a row. ConfigError if `workdir` holds a run that is not this one; Preempted after a
    SIGTERM; LockError if another run works in `workdir`. With `profile_dir`, a trace of a few steps is written there,
    for XProf.
    """
    workdir = epath.Path(workdir)
    prepared = store.Store.finished(data_dir, config)
    with lock.held(workdir):
        return _train(config, workdir, data_dir, prepared, resume, init_from, profile_dir, max_bad_steps)


def _train(
    config: Config,
    workdir: epath.Path,
    data_dir: epath.PathLike,
    prepared: store.Store,
    resume: bool,
    init_from: epath.PathLike | None,
    profile_dir: epath.PathLike | None,
    max_bad_steps: int,
) -> float:
    vocabulary = prepared.vocabulary()
    _claim(workdir, config, vocabulary, resume)

    mesh = step_lib.make_mesh()
    stage = _stage(config, prepared, data_dir, init_from)
    plan, feed = validation.make_feed(
        config,
        prepared.split("train"),
        vocabulary,
        mesh,
        config.train.steps_per_dispatch,
        stage.sources.get("train"),
        stage.frozen,
    )
    per_epoch = plan.steps_per_epoch
    first_stage = config.train.epochs * per_epoch
    last = first_stage + config.train.cider_epochs * per_epoch
    print(
        f"{plan.num_captions} training captions, {per_epoch} steps an epoch, padded to"
        f" {', '.join(map(str, plan.buckets))} tokens ({plan.padding:.0%} padding);"
        f" features {'on the device' if feed.resident else 'streamed'}; {mesh.size} devices"
    )
    bind, init = model.create(config, prepared.feature_dim, len(vocabulary))
    schedule = step_lib.learning_rate(config.train, first_stage)
    optimizer = step_lib.make_optimizer(config.train)
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, first_stage, stage.encode)
    validate = validation.Validation(
        config,
        prepared.split("val"),
        vocabulary,
        mesh,
        decode.make_decode(bind, config.decode),
        step_lib.make_eval_step(bind, mesh, config.train, stage.encode),
        stage,
    )
    processes.first_does(lambda: checkpoint.mend(workdir / "checkpoints"))
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    fresh = step_lib.init_state(init, optimizer, config.seed, mesh, config.train.ema, stage.trained)
    compiled = loop.Compiled(train_step, fresh, feed)
    if config.train.cider_epochs:
        captions = [row.captions for row in prepared.split("train").rows]
        draw = self_critical.SelfCritical(bind, config, mesh, feed, vocabulary, captions)
        critical_step = self_critical.make_train_step(bind, optimizer, schedule, mesh, config.train)
        critical = loop.Compiled(critical_step, fresh, feed)
    state, progress = _start(fresh, checkpoints, init_from, config, vocabulary, data_dir)
    step = int(state.step)
    if step < last:
        need = compiled.check(config.train.batch_images, int(plan.buckets[-1]))
        capacity = memory.capacity(jax.local_devices())
        print(f"a step takes up to {memory.megabytes(need)} of a device's {memory.megabytes(capacity)}")
    standing = loop.Standing(config.train, progress)
    metrics = logs.Metrics(workdir, step)
    clock = logs.Clock(progress)
    window = loop.Window(metrics, clock, step, max_bad_steps, progress.get("window", {}))

    cuts = config.train.log_every, config.train.checkpoint_every
    dispatches = feed.ahead(plan.dispatches(step, step if standing.stop else last, cuts))
    bar = tqdm.tqdm(desc="train", total=last, initial=step, unit=" steps", disable=None)
    profile = logs.Profile(profile_dir)
    preemption = loop.Preemption()
    try:
        with _closing(checkpoints, metrics), preemption, jax.transfer_guard("disallow"), bar, profile:
            for batches, inputs in dispatches:
                count, of_length, of_host = len(batches), compiled, {}
                if step >= first_stage:
                    inputs, of_host["cider_d"] = draw(state, inputs, batches)
                    of_length = critical
                length = inputs.tokens_KICT.shape[-1]
                if length not in of_length:
                    jax.block_until_ready(state)
                    clock.pause()
                run = of_length[length]
                profile.dispatch(state)
                state, step_metrics = run(state, inputs)
                clock.run()
                step += count
                bar.update(count)
                window.write()  # the line of the steps before these, which keep the device busy meanwhile
                window.add(count, step_metrics | of_host)
                epoch, within = divmod(step, per_epoch)
                end = preemption.reached()
                save = not within or _every(config.train.checkpoint_every, step)
                if save or _every(config.train.log_every, step):
                    window.close(step)
                if not save and not end:
                    continue
                bar.set_postfix(window.write())
                open_window = window.progress()
                clock.pause()
                score = None
                if not within:
                    found = validate(state.best_params)
                    score = found["cider"]
                    state = standing.after(score, state)
                    metrics.write(step, {"epoch": epoch, **{f"val/{name}": value for name, value in found.items()}})
                    bar.write(
                        f"epoch {epoch}: validation loss {found['loss']:.4f}, accuracy {found['accuracy']:.1%},"
                        f" CIDEr {score:.4f}, best {standing.best:.4f}"
                    )
                    _plot(workdir)
                progress = {**standing.progress, "seconds": clock.seconds, "window": open_window}
                checkpoints.save(step, state, progress, score)
                if end:
                    checkpoints.wait()
                    raise Preempted(f"saved at step {step} of {last}; the same command goes on there")
                if standing.stop:
                    bar.write(f"no better validation score for {standing.since} epochs: the run ends")
                    break
    except loop.NotFinite as e:
        where = _keep_batch(workdir, prepared.split("train"), plan, e.first)
        raise NotFiniteError(
            f"--max_bad_steps={max_bad_steps}: loss or gradient was not finite at {e}, which were skipped; the batch of"
            f" the first of them is in {where}. The newest checkpoint is sound. If the batch is too, a lower"
            " --config.train.learning_rate may help"
        ) from None
    print(f"trained {step} steps in {clock.seconds:.0f} s, best validation CIDEr {standing.best:.4f}: {workdir}")
    return standing.best


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints, metrics: logs.Metrics) -> Iterator[None]:
    """Closes both at the end; LostError, at once, where another process does not answer."""
    lost = False
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() == 1:
            raise
        lost = True
        raise LostError(
            f"another process has gone or cannot be reached; start all processes again with the same command ({e})"
        ) from e
    finally:
        if not lost:
            checkpoints.close()
            metrics.close()


def _keep_batch(workdir: epath.Path, split: store.Split, plan: Plan, step: int) -> epath.Path:
    """A step's images and true captions, for a look: `feats_IPF` float32, `tokens_ICT`, `rows_I`, `files_I`."""
    batch = plan.batch(step)
    file = workdir / f"bad_step_{step}.npz"
    if jax.process_index() == 0:
        rows_I = batch.rows_I[batch.rows_I >= 0]
        with file.open("wb") as f:
            np.savez_compressed(
                f,
                feats_IPF=split.read(rows_I).astype(np.float32),
                tokens_ICT=batch.tokens_ICT[batch.rows_I >= 0],
                rows_I=rows_I,
                files_I=np.array([split.rows[row].filename for row in rows_I]),
            )
    return file


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _claim(workdir: epath.Path, config: Config, vocabulary: Vocabulary, resume: bool) -> None:
    """Makes the workdir this run's. ConfigError if it is another's, or is not to be gone on with."""
    file, words = workdir / "config.json", workdir / "vocabulary.json"
    if file.exists():
        if not resume:
            raise ConfigError(f"--noresume, but --workdir={workdir} holds a run; take another, or delete it")
        # Where self-critical training begins is fixed too.
        fixed = (*FIXED, "train.epochs") if config.train.cider_epochs else FIXED
        changed = presets.difference(presets.load(str(file)), config, fixed)
        if changed:
            raise ConfigError(
                f"--workdir={workdir} holds a run of another preset: {'; '.join(changed)}; take another --workdir"
            )
        if Vocabulary.from_json(words.read_text(), str(words)).hash != vocabulary.hash:
            raise ConfigError(f"--workdir={workdir} holds a run with another vocabulary; take another --workdir")
    if jax.process_index() == 0:
        (workdir / checksums.SUMS).unlink(missing_ok=True)
        store.write_whole(words, vocabulary.to_json())
        store.write_whole(file, presets.to_json(config))
        checksums.write_sums(workdir, (file.name, words.name))


def _stage(config: Config, prepared: store.Store, data_dir: epath.PathLike, init_from: epath.PathLike | None) -> Stage:
    """Pictures and the encoder of the store, or of `init_from`, where it is fine-tuned; else nothing."""
    options = config.train.finetune
    if not options.block:
        return FEATURES
    encoder = export.load_any(init_from, data_dir).encoder if init_from else export.encoder_of(prepared, config)
    frozen, trained = finetune.split(encoder, options.block, config.encoder.block)
    builder = data.of_preset(config, data_dir)
    sources = {}
    for role in ("train", "val"):
        examples = data.read(builder, prepared.manifest["splits"][role]["split"])
        images = prepared.split(role).images
        sources[role] = finetune.Pictures(lambda row, e=examples: e[row].image, images, config.encoder.image_size)
    encode = finetune.make_encode(config.encoder, options)
    return Stage(sources, frozen, {ENCODER: trained}, encode)


def _start(
    fresh: step_lib.TrainState,
    checkpoints: Checkpoints,
    init_from: epath.PathLike | None,
    config: Config,
    vocabulary: Vocabulary,
    data_dir: epath.PathLike,
) -> tuple[step_lib.TrainState, dict]:
    """The state to start from, and the saved progress: DESIGN's restore order."""
    if checkpoints.latest_step is not None:
        state, progress = checkpoints.restore(fresh)
        print(f"going on at step {int(state.step)}")
        return state, progress
    if init_from is not None:
        params = export.load_any(init_from, data_dir).params
        if ENCODER in fresh.params:  # already that of --init_from, see `_stage`
            params = params | {ENCODER: fresh.params[ENCODER]}
        check_shapes(f"--init_from={init_from}", params, fresh.params)
    elif config.model.embeddings:
        params = jax.device_get(fresh.params)
        vectors = embeddings.read(config.model.embeddings, vocabulary, config.model.embedding_dim)
        table_VE = np.array(params["embedding"]["embedding"])
        table_VE[list(vectors)] = list(vectors.values())
        params["embedding"]["embedding"] = table_VE
        print(f"{len(vectors)} of {len(vocabulary)} words start with vectors of {config.model.embeddings}")
    else:
        return fresh, {}

    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    # A copy: the step is given both, and takes their memory.
    average = None if fresh.average is None else jax.tree.map(jnp.copy, put)
    return fresh._replace(params=put, average=average), {}


def _plot(workdir: epath.Path) -> None:
    if jax.process_index() == 0:
        with (workdir / "loss.png").open("wb") as f:
            plots.loss_plot(logs.read(workdir), f)
