"""`flaxcap train`: joins the store, the feed, the model and the optimizer, and trains."""

import os
import sys
import types

import jax
from etils import epath

from flaxcap.commands import FAILED, PREEMPTED, start
from flaxcap.config import Config
from flaxcap.decoding import generate
from flaxcap.features import store
from flaxcap.files import locks
from flaxcap.inference import plots
from flaxcap.input_pipeline.batching import Plan
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import device_memory, devices, multihost, sharding
from flaxcap.training import checkpoints as checkpoints_lib
from flaxcap.training import logs, self_critical, validation
from flaxcap.training import step as step_lib
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.compiled_step import CompiledStep
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import TrainState, init_state
from flaxcap.training.trainer import LostError, Parts, Preempted, Trainer, timeline


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
    """Trains to the preset's last epoch and returns the best validation score: the CIDEr of generated captions.

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
    workdir = epath.Path(workdir)
    prepared = store.Store.finished(data_dir, config)
    with locks.held(workdir):
        start.claim(workdir, config, prepared.vocabulary(), resume)
        parts, fresh = _join(config, workdir, data_dir, prepared, init_from)
        state, progress = start.state(fresh, parts.checkpoints, init_from, config, prepared.vocabulary(), data_dir)
        if int(state.step) < timeline(config.train, parts.plan).total:
            _check_memory(config, parts)
        return Trainer(parts, state, progress, max_bad_steps=max_bad_steps, profile_dir=profile_dir).run()


def _join(
    config: Config,
    workdir: epath.Path,
    data_dir: epath.PathLike,
    prepared: store.Store,
    init_from: epath.PathLike | None,
) -> tuple[Parts, TrainState]:
    """Returns the parts of a run, and a new state. `start.state` may replace the state."""
    vocabulary, train_split = prepared.vocabulary(), prepared.split("train")
    mesh = sharding.make_mesh()
    stage = start.stage(config, prepared, data_dir, init_from)
    source = stage.sources.get("train")
    plan, feed = validation.make_feed(
        config, train_split, vocabulary, mesh, config.train.steps_per_dispatch, source, stage.frozen
    )
    _print_plan(plan, feed, mesh.size)
    sizes = decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(vocabulary), prepared.positions_vary)
    bind, init = decoder_lib.create(config, sizes)
    _, first_stage, last = timeline(config.train, plan)
    schedule = learning_rate(config.train, first_stage, last - first_stage)
    optimizer = make_optimizer(config.train)
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, first_stage, stage.encode)
    eval_step = step_lib.make_eval_step(bind, mesh, config.train, stage.encode)
    generator = generate.Generator(bind, config.decode)
    validate = validation.Validation(config, prepared.split("val"), vocabulary, mesh, generator, eval_step, stage)
    multihost.first_does(lambda: checkpoints_lib.mend(workdir / "checkpoints"))
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_latest)
    fresh = init_state(init, optimizer, config.seed, mesh, config.train.ema, stage.trained)
    critical = None
    if config.train.cider_epochs:
        captions = [row.captions for row in train_split.rows]
        sample = self_critical.SelfCritical(bind, config, mesh, feed, vocabulary, captions)
        critical_step = self_critical.make_train_step(bind, optimizer, schedule, mesh, config.train)
        critical = sample, CompiledStep(critical_step, fresh, feed)
    parts = Parts(
        config=config.train,
        workdir=workdir,
        split=train_split,
        plan=plan,
        feed=feed,
        compiled=CompiledStep(train_step, fresh, feed),
        self_critical=critical,
        validate=validate,
        checkpoints=checkpoints,
        after_epoch=lambda: _plot(workdir),
    )
    return parts, fresh


def _print_plan(plan: Plan, feed: Feed, devices: int) -> None:
    print(
        f"{plan.num_captions} training captions, {plan.steps_per_epoch} steps an epoch, padded to"
        f" {', '.join(map(str, plan.buckets))} tokens ({plan.padding:.0%} padding);"
        f" features {'on the device' if feed.resident else 'streamed'}; {devices} devices"
    )


def _check_memory(config: Config, parts: Parts) -> None:
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
