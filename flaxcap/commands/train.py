"""`flaxcap train`: the loop. Everything it does to arrays is in train_step, everything it reads in feed."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from etils import epath

from flaxcap.commands import start
from flaxcap.config import Config
from flaxcap.decoding import generate
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.files import locks
from flaxcap.inference import plots
from flaxcap.input_pipeline.batching import Plan
from flaxcap.models import recurrent
from flaxcap.runtime import device_memory, multihost, sharding
from flaxcap.training import checkpoints as checkpoints_lib
from flaxcap.training import logs, loop, self_critical, validation
from flaxcap.training import step as step_lib
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import TrainState, init_state


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
    with locks.held(workdir):
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
    start.claim(workdir, config, vocabulary, resume)

    mesh = sharding.make_mesh()
    stage = start.stage(config, prepared, data_dir, init_from)
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
    bind, init = recurrent.create(config, prepared.feature_dim, len(vocabulary))
    schedule = learning_rate(config.train, first_stage, last - first_stage)
    optimizer = make_optimizer(config.train)
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, first_stage, stage.encode)
    validate = validation.Validation(
        config,
        prepared.split("val"),
        vocabulary,
        mesh,
        generate.make_decode(bind, config.decode),
        step_lib.make_eval_step(bind, mesh, config.train, stage.encode),
        stage,
    )
    multihost.first_does(lambda: checkpoints_lib.mend(workdir / "checkpoints"))
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    fresh = init_state(init, optimizer, config.seed, mesh, config.train.ema, stage.trained)
    compiled = loop.Compiled(train_step, fresh, feed)
    if config.train.cider_epochs:
        captions = [row.captions for row in prepared.split("train").rows]
        draw = self_critical.SelfCritical(bind, config, mesh, feed, vocabulary, captions)
        critical_step = self_critical.make_train_step(bind, optimizer, schedule, mesh, config.train)
        critical = loop.Compiled(critical_step, fresh, feed)
    state, progress = start.state(fresh, checkpoints, init_from, config, vocabulary, data_dir)
    step = int(state.step)
    if step < last:
        need = compiled.check(config.train.batch_images, int(plan.buckets[-1]))
        capacity = device_memory.capacity(jax.local_devices())
        print(f"a step takes up to {device_memory.megabytes(need)} of a device's {device_memory.megabytes(capacity)}")
    standing = loop.Standing(config.train, progress)
    unscored = progress.get("unscored", False)  # the state of an epoch's end, whose validation was interrupted
    metrics = logs.Metrics(workdir, step, not unscored)
    clock = logs.Clock(progress)
    window = loop.Window(metrics, clock, step, max_bad_steps, progress.get("window", {}))

    cuts = config.train.log_every, config.train.checkpoint_every
    bar = tqdm.tqdm(desc="train", total=last, initial=step, unit=" steps", disable=None)
    profile = logs.Profile(profile_dir)
    preemption = loop.Preemption()

    def close_epoch(state: TrainState) -> tuple[TrainState, float]:
        """Validates, writes it down, and draws the consequences; the score."""
        found = validate(state.best_params, preemption.noted)
        state = standing.after(found["cider"], state)
        epoch = step // per_epoch
        metrics.write(step, {"epoch": epoch, **{f"val/{name}": value for name, value in found.items()}})
        bar.write(
            f"epoch {epoch}: validation loss {found['loss']:.4f}, accuracy {found['accuracy']:.1%},"
            f" CIDEr {found['cider']:.4f}, best {standing.best:.4f}"
        )
        _plot(workdir)
        return state, found["cider"]

    def save(state: TrainState, window: dict, score: float | None = None, **more: bool) -> None:
        progress = {**standing.progress, "seconds": clock.seconds, "window": window, **more}
        checkpoints.save(step, state, progress, score)

    try:
        with _closing(checkpoints, metrics), preemption, jax.transfer_guard("disallow"), bar, profile:
            if unscored:
                try:
                    state, score = close_epoch(state)
                except validation.Interrupted:
                    raise _preempted(step, last) from None
                checkpoints.delete(step)
                save(state, window.progress(), score)
            for batches, inputs in feed.ahead(plan.dispatches(step, step if standing.stop else last, cuts)):
                count, of_length, of_host = len(batches), compiled, {}
                if step >= first_stage:
                    inputs, of_host["cider_d"] = draw(state, inputs, batches)
                    of_length = critical
                length = inputs.tokens_JICT.shape[-1]
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
                end, of_epoch = preemption.reached(), step % per_epoch == 0
                due = of_epoch or _every(config.train.checkpoint_every, step)
                if due or _every(config.train.log_every, step):
                    window.close(step)
                if not due and not end:
                    continue
                bar.set_postfix(window.write())
                open_window, score = window.progress(), None
                clock.pause()
                if of_epoch and not end:
                    try:
                        state, score = close_epoch(state)
                    except validation.Interrupted:
                        end = True
                save(state, open_window, score, unscored=of_epoch and score is None)
                if end:
                    checkpoints.wait()
                    raise _preempted(step, last)
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


def _preempted(step: int, last: int) -> Preempted:
    return Preempted(f"saved at step {step} of {last}; the same command goes on there")


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


def _plot(workdir: epath.Path) -> None:
    if jax.process_index() == 0:
        with (workdir / "loss.png").open("wb") as f:
            plots.loss_plot(logs.read(workdir), f)
