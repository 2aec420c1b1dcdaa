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
from flaxcap import export, logs, model, plots, store
from flaxcap import train_step as step_lib
from flaxcap.batches import Plan
from flaxcap.checkpoint import Checkpoints, check_shapes
from flaxcap.config import Config, ConfigError
from flaxcap.feed import Feed
from flaxcap.text import Tokens, Vocabulary

# What a run cannot change on its way: the meaning of its parameters, and of its steps.
FIXED = (
    *("dataset", "seed", "data", "encoder", "model"),
    *("train.batch_images", "train.captions_per_image", "train.num_buckets"),
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
) -> float:
    """Trains to the preset's last epoch and returns the lowest validation loss (nats a token).

    It starts from the newest checkpoint in `workdir`, else from the parameters of the export `init_from`, else
    from scratch, always in this order. ConfigError if `workdir` holds a run that is not this one; Preempted
    after a SIGTERM.
    """
    workdir = epath.Path(workdir)
    prepared = store.Store.finished(data_dir, config)
    vocabulary = prepared.vocabulary()
    _claim(workdir, config, vocabulary, resume)

    mesh = step_lib.make_mesh()
    plan, feed = make_feed(config, prepared.split("train"), vocabulary, mesh)
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
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh)
    eval_step = step_lib.make_eval_step(bind, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    fresh = step_lib.init_state(init, optimizer, config.seed, mesh)
    state, progress = _start(fresh, checkpoints, init_from)
    step = int(state.step)
    best = progress.get("best", float("inf"))
    metrics = logs.Metrics(workdir, step)
    clock = logs.Clock(progress)
    window = _Window(metrics, clock)

    batches = (plan.batch(s) for s in range(step, last))
    bar = tqdm.tqdm(feed.ahead(batches), "train", last, initial=step, unit=" steps", disable=None)
    compiled = set()
    with _Sigterm() as sigterm, jax.transfer_guard("disallow"), bar:
        for inputs in bar:
            if inputs.tokens_ICT.shape not in compiled:
                compiled.add(inputs.tokens_ICT.shape)
                jax.block_until_ready(state)
                clock.pause()
            state, step_metrics = train_step(state, inputs)
            clock.run()
            step += 1
            window.write()  # the line of the steps before this one, which keeps the device busy meanwhile
            window.add(step_metrics)
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


def make_feed(config: Config, split: store.Split, vocabulary: Vocabulary, mesh: Mesh) -> tuple[Plan, Feed]:
    """The batches of a prepared split, and what puts them onto the mesh."""
    captions = (row.captions for row in split.rows)
    plan = Plan(
        Tokens.of(captions, vocabulary, config.data.max_length),
        batch_images=config.train.batch_images,
        captions_per_image=config.train.captions_per_image,
        num_buckets=config.train.num_buckets,
        seed=config.seed,
        skip={s.row for s in split.skipped()},
    )
    return plan, Feed(split, plan, mesh, config.train.features)


def validate(eval_step: Callable, params: model.Params, plan: Plan, feed: Feed) -> tuple[float, float]:
    """Cross-entropy (nats a token) and teacher-forced accuracy over every caption of a plan, each counted once."""
    batches = (plan.in_order(n) for n in range(plan.steps_per_epoch))
    sums = jax.device_get([eval_step(params, inputs) for inputs in feed.ahead(batches)])
    total, count, right = (math.fsum(column) for column in zip(*sums, strict=True))
    return total / count, right / count


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


class _Window:
    """The steps between two lines of the log; their metrics stay on the device until the line is written."""

    def __init__(self, metrics: logs.Metrics, clock: logs.Clock):
        self._metrics, self._clock, self._since = metrics, clock, clock.seconds
        self._steps: list[dict[str, jax.Array]] = []
        self._closed: tuple[int, list] | None = None

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._steps.append(metrics)

    def close(self, step: int) -> None:
        """The line of `step` tells of the steps added so far."""
        self._closed, self._steps = (step, self._steps), []

    def write(self) -> dict[str, str] | None:
        """Writes the closed window's line, waiting for its last step; what a progress bar shows of it."""
        if self._closed is None:
            return None
        (step, steps), self._closed = self._closed, None
        fetched = jax.device_get(steps)
        sums = {name: sum(float(m[name]) for m in fetched) for name in fetched[0]}
        seconds = max(self._clock.now() - self._since, 1e-9)
        self._since += seconds
        values = {
            "train/loss": sums["nats"] / sums["tokens"],
            "train/accuracy": sums["right"] / sums["tokens"],
            "train/grad_norm": sums["grad_norm"] / len(fetched),
            "train/learning_rate": float(fetched[-1]["learning_rate"]),
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
