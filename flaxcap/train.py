"""`flaxcap train`: the loop. Everything it does to arrays is in train_step, everything it reads in feed."""

import math
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh

from flaxcap import config as config_lib
from flaxcap import export, logs, memory, model, plots, store
from flaxcap import train_step as step_lib
from flaxcap.batches import Plan
from flaxcap.checkpoint import Checkpoints, check_shapes
from flaxcap.config import Config, ConfigError
from flaxcap.feed import Feed
from flaxcap.text import Tokens, Vocabulary

# What a run cannot change on its way: the meaning of its parameters, and of its steps.
FIXED = (
    *("dataset", "seed", "data", "encoder", "model"),
    *("train.batch_images", "train.captions_per_image", "train.num_buckets", "train.steps_per_dispatch"),
)


class Preempted(Exception):
    """The run was told to end (SIGTERM), has saved, and wants to be started again."""


def train(
    config: Config,
    workdir: epath.PathLike,
    data_dir: epath.PathLike,
    *,
    resume: bool = True,
    init_from: epath.PathLike | None = None,
    profile_dir: epath.PathLike | None = None,
) -> float:
    """Trains to the preset's last epoch and returns the lowest validation loss (nats a token).

    It starts from the newest checkpoint in `workdir`, else from the parameters of the export `init_from`, else
    from scratch, always in this order. ConfigError if `workdir` holds a run that is not this one; Preempted
    after a SIGTERM. With `profile_dir`, a trace of a few steps is written there, for XProf.
    """
    workdir = epath.Path(workdir)
    prepared = store.Store.finished(data_dir, config)
    vocabulary = prepared.vocabulary()
    _claim(workdir, config, vocabulary, resume)

    mesh = step_lib.make_mesh()
    plan, feed = make_feed(config, prepared.split("train"), vocabulary, mesh, config.train.steps_per_dispatch)
    val_plan, val_feed = make_feed(config, prepared.split("val"), vocabulary, mesh)
    per_epoch = plan.steps_per_epoch
    last = config.train.epochs * per_epoch
    print(
        f"{plan.num_captions} training captions, {per_epoch} steps an epoch, padded to"
        f" {', '.join(map(str, plan.buckets))} tokens ({plan.padding:.0%} padding);"
        f" features {'on the device' if feed.resident else 'streamed'}; {mesh.size} devices"
    )
    bind, init = model.create(config, prepared.feature_dim, len(vocabulary))
    schedule = step_lib.learning_rate(config.train, last)
    optimizer = step_lib.make_optimizer(config.train, schedule)
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train)
    eval_step = step_lib.make_eval_step(bind, mesh, config.train)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    fresh = step_lib.init_state(init, optimizer, config.seed, mesh)
    compiled = _Compiled(train_step, fresh, feed)
    state, progress = _start(fresh, checkpoints, init_from)
    step = int(state.step)
    if step < last:
        need = compiled.check(config.train.batch_images, int(plan.buckets[-1]))
        capacity = memory.capacity(jax.local_devices())
        print(f"a step takes up to {memory.megabytes(need)} of a device's {memory.megabytes(capacity)}")
    best = progress.get("best", float("inf"))
    metrics = logs.Metrics(workdir, step)
    clock = logs.Clock(progress)
    window = _Window(metrics, clock)

    cuts = config.train.log_every, config.train.checkpoint_every
    dispatches = feed.ahead(plan.dispatches(step, last, cuts))
    bar = tqdm.tqdm(desc="train", total=last, initial=step, unit=" steps", disable=None)
    profile = logs.Profile(profile_dir)
    with _Sigterm() as sigterm, jax.transfer_guard("disallow"), bar, profile:
        for count, inputs in dispatches:
            length = inputs.tokens_KICT.shape[-1]
            if length not in compiled:
                jax.block_until_ready(state)
                clock.pause()
            run = compiled[length]
            profile.dispatch(state)
            state, step_metrics = run(state, inputs)
            clock.run()
            step += count
            bar.update(count)
            window.write()  # the line of the steps before these, which keep the device busy meanwhile
            window.add(count, step_metrics)
            epoch, within = divmod(step, per_epoch)
            save = not within or sigterm.received or _every(config.train.checkpoint_every, step)
            if save or _every(config.train.log_every, step):
                window.close(step)
            if not save:
                continue
            bar.set_postfix(window.write())
            clock.pause()
            loss = None
            if not within:
                loss, accuracy = validate(eval_step, state.params, val_plan, val_feed)
                best = min(best, loss)
                metrics.write(step, {"epoch": epoch, "val/loss": loss, "val/accuracy": accuracy})
                bar.write(f"epoch {epoch}: validation loss {loss:.4f}, accuracy {accuracy:.1%}, best {best:.4f}")
                _plot(workdir)
            checkpoints.save(step, state, {"best": best, "seconds": clock.seconds}, loss)
            if sigterm.received:
                checkpoints.close()
                metrics.close()
                raise Preempted(f"saved at step {step} of {last}; the same command goes on there")
    checkpoints.close()
    metrics.close()
    print(f"trained {step} steps in {clock.seconds:.0f} s, lowest validation loss {best:.4f}: {workdir}")
    return best


def make_feed(
    config: Config, split: store.Split, vocabulary: Vocabulary, mesh: Mesh, run: int = 1
) -> tuple[Plan, Feed]:
    """The batches of a prepared split, `run` of them a dispatch, and what puts them onto the mesh."""
    captions = (row.captions for row in split.rows)
    plan = Plan(
        Tokens.of(captions, vocabulary, config.data.max_length),
        batch_images=config.train.batch_images,
        captions_per_image=config.train.captions_per_image,
        num_buckets=config.train.num_buckets,
        run=run,
        seed=config.seed,
        skip={s.row for s in split.skipped()},
    )
    return plan, Feed(split, plan, mesh, config.train.features)


def validate(eval_step: Callable, params: model.Params, plan: Plan, feed: Feed) -> tuple[float, float]:
    """Cross-entropy (nats a token) and teacher-forced accuracy over every caption of a plan, each counted once."""
    batches = ([plan.in_order(n)] for n in range(plan.steps_per_epoch))
    sums = jax.device_get([eval_step(params, inputs) for _, inputs in feed.ahead(batches)])
    nats, tokens, right = (math.fsum(column) for column in zip(*sums, strict=True))
    return nats / tokens, right / tokens


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _claim(workdir: epath.Path, config: Config, vocabulary: Vocabulary, resume: bool) -> None:
    """Makes the workdir this run's. ConfigError if it is another's, or is not to be gone on with."""
    file, words = workdir / "config.json", workdir / "vocabulary.json"
    if file.exists():
        if not resume:
            raise ConfigError(f"--noresume, but --workdir={workdir} holds a run; take another, or delete it")
        changed = config_lib.difference(config_lib.load(str(file)), config, FIXED)
        if changed:
            raise ConfigError(
                f"--workdir={workdir} holds a run of another preset: {'; '.join(changed)}; take another --workdir"
            )
        if Vocabulary.from_json(words.read_text(), str(words)).hash != vocabulary.hash:
            raise ConfigError(f"--workdir={workdir} holds a run with another vocabulary; take another --workdir")
    if jax.process_index() == 0:
        store.write_whole(words, vocabulary.to_json())
        store.write_whole(file, config_lib.to_json(config))


def _start(
    fresh: step_lib.TrainState, checkpoints: Checkpoints, init_from: epath.PathLike | None
) -> tuple[step_lib.TrainState, dict]:
    """The state to start from, and the saved progress: DESIGN's restore order."""
    if checkpoints.latest_step is not None:
        state, progress = checkpoints.restore(fresh)
        print(f"going on at step {int(state.step)}")
        return state, progress
    if init_from is None:
        return fresh, {}
    params = export.load(model_dir=init_from).params
    check_shapes(f"--init_from={init_from}", params, fresh.params)
    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    return fresh._replace(params=put), {}


class _Compiled(dict):
    """The step for each length that it meets, compiled when it does."""

    def __init__(self, train_step: Any, state: step_lib.TrainState, feed: Feed):
        self._train_step, self._feed = train_step, feed
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    def __missing__(self, length: int) -> jax.stages.Compiled:
        self[length] = self._compile(None, length)
        return self[length]

    def check(self, images: int, length: int) -> int:
        """The bytes that the longest step needs on each device; ConfigError if it has less."""

        def compile_for(n: int) -> jax.stages.Compiled:
            return self[length] if n == images else self._compile(n, length)

        return memory.check(compile_for, images, jax.local_devices(), jax.device_count())

    def _compile(self, images: int | None, length: int) -> jax.stages.Compiled:
        return self._train_step.lower(self._state, self._feed.spec(length, images)).compile()


class _Window:
    """The steps between two lines of the log; their metrics stay on the device until the line is written."""

    def __init__(self, metrics: logs.Metrics, clock: logs.Clock):
        self._metrics, self._clock, self._since = metrics, clock, clock.seconds
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []
        self._closed: tuple[int, list] | None = None

    def add(self, count: int, metrics: dict[str, jax.Array]) -> None:
        """The metrics of a dispatch: arrays of which the first `count` entries are meant, the others 0."""
        self._steps.append((count, metrics))

    def close(self, step: int) -> None:
        """The line of `step` tells of the steps added so far."""
        self._closed, self._steps = (step, self._steps), []

    def write(self) -> dict[str, str] | None:
        """Writes the closed window's line, waiting for its last step; what a progress bar shows of it."""
        if self._closed is None:
            return None
        (step, steps), self._closed = self._closed, None
        fetched = jax.device_get(steps)
        counts = [count for count, _ in fetched]
        sums = {name: sum(float(m[name].sum()) for _, m in fetched) for name in fetched[0][1]}
        seconds = max(self._clock.now() - self._since, 1e-9)
        self._since += seconds
        values = {
            "train/loss": sums["nats"] / sums["tokens"],
            "train/accuracy": sums["right"] / sums["tokens"],
            "train/grad_norm": sums["grad_norm"] / sum(counts),
            "train/learning_rate": float(fetched[-1][1]["learning_rate"][counts[-1] - 1]),
            "captions_per_s": sums["captions"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
        }
        self._metrics.write(step, values)
        return {"loss": f"{values['train/loss']:.3f}", "captions/s": f"{values['captions_per_s']:.0f}"}


class _Sigterm:
    """Inside, a SIGTERM is noted instead of ending the process."""

    received = False

    def __enter__(self) -> "_Sigterm":
        if threading.current_thread() is threading.main_thread():
            self._before: Any = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.received = True


def _plot(workdir: epath.Path) -> None:
    if jax.process_index() == 0:
        with (workdir / "loss.png").open("wb") as f:
            plots.loss_plot(logs.read(workdir), f)
