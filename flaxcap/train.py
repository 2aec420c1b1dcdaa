"""`flaxcap train`: the loop. Everything it does to arrays is in train_step, everything it reads in feed."""

import math
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from flaxcap import config as config_lib
from flaxcap import (
    data,
    decode,
    embeddings,
    export,
    finetune,
    logs,
    memory,
    model,
    plots,
    presets,
    self_critical,
    store,
    validation,
)
from flaxcap import train_step as step_lib
from flaxcap.checkpoint import Checkpoints, check_shapes
from flaxcap.config import Config, ConfigError
from flaxcap.feed import FEATURES, Feed, Stage
from flaxcap.model import ENCODER
from flaxcap.text import Vocabulary

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
    """Trains to the preset's last epoch and returns the best validation score (CIDEr of the model's own captions).

    It starts from the newest checkpoint in `workdir`, else from the parameters of the export `init_from`, else
    from scratch, always in this order. ConfigError if `workdir` holds a run that is not this one; Preempted
    after a SIGTERM. With `profile_dir`, a trace of a few steps is written there, for XProf.
    """
    workdir = epath.Path(workdir)
    prepared = store.Store.finished(data_dir, config)
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
    optimizer = step_lib.make_optimizer(config.train, schedule)
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
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    fresh = step_lib.init_state(init, optimizer, config.seed, mesh, config.train.ema, stage.trained)
    compiled = _Compiled(train_step, fresh, feed)
    if config.train.cider_epochs:
        captions = [row.captions for row in prepared.split("train").rows]
        draw = self_critical.SelfCritical(bind, config, mesh, feed, vocabulary, captions)
        critical_step = self_critical.make_train_step(bind, optimizer, schedule, mesh, config.train)
        critical = _Compiled(critical_step, fresh, feed)
    state, progress = _start(fresh, checkpoints, init_from, config, vocabulary, data_dir)
    step = int(state.step)
    if step < last:
        need = compiled.check(config.train.batch_images, int(plan.buckets[-1]))
        capacity = memory.capacity(jax.local_devices())
        print(f"a step takes up to {memory.megabytes(need)} of a device's {memory.megabytes(capacity)}")
    standing = _Standing(config.train, progress)
    metrics = logs.Metrics(workdir, step)
    clock = logs.Clock(progress)
    window = _Window(metrics, clock)

    cuts = config.train.log_every, config.train.checkpoint_every
    dispatches = feed.ahead(plan.dispatches(step, step if standing.stop else last, cuts))
    bar = tqdm.tqdm(desc="train", total=last, initial=step, unit=" steps", disable=None)
    profile = logs.Profile(profile_dir)
    with _Sigterm() as sigterm, jax.transfer_guard("disallow"), bar, profile:
        for batches, inputs in dispatches:
            count, of_length = len(batches), compiled
            if step >= first_stage:
                inputs, of_length = draw(state, inputs, batches), critical
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
            window.add(count, step_metrics)
            epoch, within = divmod(step, per_epoch)
            save = not within or sigterm.received or _every(config.train.checkpoint_every, step)
            if save or _every(config.train.log_every, step):
                window.close(step)
            if not save:
                continue
            bar.set_postfix(window.write())
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
            checkpoints.save(step, state, {**standing.progress, "seconds": clock.seconds}, score)
            if sigterm.received:
                checkpoints.close()
                metrics.close()
                raise Preempted(f"saved at step {step} of {last}; the same command goes on there")
            if standing.stop:
                bar.write(f"no better validation score for {standing.since} epochs: the run ends")
                break
    checkpoints.close()
    metrics.close()
    print(f"trained {step} steps in {clock.seconds:.0f} s, best validation CIDEr {standing.best:.4f}: {workdir}")
    return standing.best


class _Standing:
    """How the run stands by its validation scores, and what follows from it."""

    def __init__(self, config: config_lib.Train, progress: dict):
        self._config = config
        self.best: float = progress.get("best", -math.inf)
        self.since: int = progress.get("since", 0)  # epochs since the best

    @property
    def progress(self) -> dict:
        return {"best": self.best, "since": self.since}

    @property
    def stop(self) -> bool:
        return 0 < self._config.stop_after <= self.since

    def after(self, score: float, state: step_lib.TrainState) -> step_lib.TrainState:
        """Notes an epoch's score; the state to go on with."""
        c = self._config
        better = score > self.best
        self.best, self.since = max(score, self.best), 0 if better else self.since + 1
        if c.schedule != "plateau" or not self.since or self.since % c.plateau_epochs:
            return state
        rate = np.asarray(jax.device_get(state.rate) * np.float32(c.plateau_factor))
        return state._replace(rate=jax.device_put(rate, state.rate.sharding))


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
        store.write_whole(words, vocabulary.to_json())
        store.write_whole(file, presets.to_json(config))


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
