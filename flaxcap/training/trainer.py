"""The training loop: dispatches, log lines, and at the end of each epoch a validation and a checkpoint."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath

from flaxcap.config import Train
from flaxcap.errors import UserError
from flaxcap.features.shards import Split
from flaxcap.input_pipeline.batching import Batch, Plan
from flaxcap.input_pipeline.device_feed import Feed, Inputs
from flaxcap.training import logs
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.compiled_step import CompiledStep
from flaxcap.training.early_stopping import EarlyStopping
from flaxcap.training.metric_window import MetricWindow, TooManyBadSteps
from flaxcap.training.preemption import Preemption
from flaxcap.training.self_critical import SelfCritical
from flaxcap.training.state import TrainState
from flaxcap.training.validation import Interrupted, Validation


class Preempted(Exception):
    """The run received SIGTERM and saved a checkpoint; the same command resumes it."""


class LostError(UserError):
    """Another process of the run is gone. Nothing that waits for it may be called any more."""


class NotFiniteError(UserError):
    """The run ends: its loss or gradient was not finite in too many steps in a row."""


class Timeline(NamedTuple):
    """Numbers of steps of a run."""

    epoch: int  # of an epoch
    cross_entropy: int  # of cross-entropy training, which comes first
    total: int  # with self-critical training


def timeline(config: Train, plan: Plan) -> Timeline:
    """Returns the numbers of steps of a run on the batches of `plan`."""
    epoch = plan.steps_per_epoch
    return Timeline(epoch, config.epochs * epoch, (config.epochs + config.cider_epochs) * epoch)


@dataclasses.dataclass(frozen=True)
class RunParts:
    """The parts of a run, which `flaxcap train` joins."""

    config: Train
    workdir: epath.Path
    split: Split  # of training
    plan: Plan
    feed: Feed
    compiled: CompiledStep  # of cross-entropy training
    self_critical: tuple[SelfCritical, CompiledStep] | None  # None: no self-critical training
    validate: Validation
    checkpoints: Checkpoints
    after_epoch: Callable[[], None]  # called after each validation


class Trainer:
    """Trains from a state to the last step of a run."""

    def __init__(
        self,
        parts: RunParts,
        state: TrainState,
        progress: dict,
        *,
        max_bad_steps: int = 10,
        profile_dir: epath.PathLike | None = None,
    ):
        """Opens the log.

        Args:
          parts: of the run.
          state: to start from; its arrays are donated.
          progress: saved with the state; {}: a new run.
          max_bad_steps: steps in a row that are not finite before the run ends.
          profile_dir: receives a trace of a few steps; None: no trace.
        """
        self._parts, self._state, self._step = parts, state, int(state.step)
        self._timeline = timeline(parts.config, parts.plan)
        self._max_bad_steps = max_bad_steps
        # True: the state is that of an epoch's end whose validation was interrupted.
        self._unscored: bool = progress.get("unscored", False)
        self._early_stopping = EarlyStopping(parts.config, progress)
        self._metrics = logs.Metrics(parts.workdir, self._step, not self._unscored)
        self._clock = logs.Clock(progress)
        self._window = MetricWindow(self._metrics, self._clock, self._step, max_bad_steps, progress.get("window", {}))
        total = self._timeline.total
        self._bar = tqdm.tqdm(desc="train", total=total, initial=self._step, unit=" steps", disable=None)
        self._profile = logs.Profile(profile_dir)
        self._preemption = Preemption()

    def run(self) -> float:
        """Trains to the last step and returns the best validation score.

        Raises:
          Preempted: after a SIGTERM, once a checkpoint is saved.
          NotFiniteError: too many steps in a row were not finite.
          LostError: another process of the run is gone.
        """
        checkpoints = self._parts.checkpoints
        try:
            with (
                _closing(checkpoints, self._metrics),
                self._preemption,
                jax.transfer_guard("disallow"),
                self._bar,
                self._profile,
            ):
                if self._unscored:
                    self._score_saved_epoch()
                self._train()
        except TooManyBadSteps as e:
            raise NotFiniteError(
                f"--max_bad_steps={self._max_bad_steps}: loss or gradient was not finite at {e}, which were skipped;"
                f" {self._save_batch(e.first)} holds the batch of the first. The newest checkpoint is not affected. If"
                " the batch is correct, try a lower --config.train.learning_rate"
            ) from None
        print(
            f"trained {self._step} steps in {self._clock.seconds:.0f} s, best validation {self._best()}:"
            f" {self._parts.workdir}"
        )
        return self._early_stopping.best

    def _best(self) -> str:
        """Returns the best score with its name."""
        best = self._early_stopping.best
        return f"CIDEr {best:.4f}" if self._parts.validate.follows_cider else f"loss {-best:.4f}"

    def _train(self) -> None:
        """Runs the dispatches up to the last step, or until there is no progress."""
        config = self._parts.config
        last = self._step if self._early_stopping.stop else self._timeline.total
        # A dispatch ends where a log line or a checkpoint is due.
        dispatches = self._parts.plan.dispatches(self._step, last, (config.log_every, config.checkpoint_every))
        for batches, inputs in self._parts.feed.ahead(dispatches):
            self._dispatch(batches, inputs)
            end, of_epoch = self._preemption.reached(), self._step % self._timeline.epoch == 0
            due = of_epoch or _every(config.checkpoint_every, self._step)
            if due or _every(config.log_every, self._step):
                self._window.close(self._step)
            if due or end:
                self._save(end, of_epoch)
                if self._early_stopping.stop:
                    self._bar.write(f"no better validation score for {self._early_stopping.since} epochs: the run ends")
                    break

    def _dispatch(self, batches: Sequence[Batch], inputs: Inputs) -> None:
        """Runs the steps of a dispatch and adds their metrics to the window."""
        compiled, of_host = self._parts.compiled, {}
        if self._step >= self._timeline.cross_entropy:
            assert self._parts.self_critical is not None
            sample, compiled = self._parts.self_critical
            inputs, of_host["cider_d"] = sample(self._state, inputs, batches)
        length = inputs.tokens_JICT.shape[-1]
        if length not in compiled:
            jax.block_until_ready(self._state)
            self._clock.pause()
        program = compiled.lookup(length)
        self._profile.dispatch(self._state)
        self._state, metrics = program(self._state, inputs)
        self._clock.run()
        self._step += len(batches)
        self._bar.update(len(batches))
        self._window.write()  # the line of earlier steps, while the device computes these
        self._window.add(len(batches), metrics | of_host)

    def _save(self, end: bool, of_epoch: bool) -> None:
        """Saves a checkpoint, after the validation of an epoch's end.

        Args:
          end: the run ends now, without a validation.
          of_epoch: the step is the last of an epoch.

        Raises:
          Preempted: `end`, or a SIGTERM interrupted the validation.
        """
        self._bar.set_postfix(self._window.write())
        window, score = self._window.progress(), None
        self._clock.pause()
        if of_epoch and not end:
            try:
                score = self._close_epoch()
            except Interrupted:
                end = True
        self._save_state(window, score, unscored=of_epoch and score is None)
        if end:
            self._parts.checkpoints.wait()
            raise self._preempted()

    def _score_saved_epoch(self) -> None:
        """Validates the restored state and replaces its checkpoint by one with a score.

        Raises:
          Preempted: a SIGTERM interrupted the validation.
        """
        try:
            score = self._close_epoch()
        except Interrupted:
            raise self._preempted() from None
        self._parts.checkpoints.delete(self._step)
        self._save_state(self._window.progress(), score)

    def _close_epoch(self) -> float:
        """Validates, writes the log line of an epoch, and returns the score.

        Raises:
          Interrupted: a SIGTERM arrived during the validation.
        """
        found = self._parts.validate(self._state.best_params, self._preemption.received)
        score = self._parts.validate.score(found)
        self._state = self._early_stopping.record(score, self._state)
        epoch = self._step // self._timeline.epoch
        self._metrics.write(self._step, {"epoch": epoch, **{f"val/{name}": value for name, value in found.items()}})
        self._bar.write(
            f"epoch {epoch}: validation loss {found['loss']:.4f}, accuracy {found['accuracy']:.1%},"
            f" CIDEr {found['cider']:.4f}, best {self._best()}"
        )
        self._parts.after_epoch()
        return score

    def _save_state(self, window: dict, score: float | None, **more: bool) -> None:
        """Saves the state with its progress; `window` is the progress of the open log line."""
        progress = {**self._early_stopping.progress, "seconds": self._clock.seconds, "window": window, **more}
        self._parts.checkpoints.save(self._step, self._state, progress, score)

    def _save_batch(self, step: int) -> epath.Path:
        """Saves a step's features (float32), true captions, rows and file names, and returns the file's path."""
        split, batch = self._parts.split, self._parts.plan.batch(step)
        file = self._parts.workdir / f"bad_step_{step}.npz"
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

    def _preempted(self) -> Preempted:
        return Preempted(f"saved at step {self._step} of {self._timeline.total}; the same command resumes there")


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints, metrics: logs.Metrics) -> Iterator[None]:
    """Closes both at the end.

    Raises:
      LostError: another process does not answer; nothing is closed then, as that would wait for it.
    """
    lost = False
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() == 1:
            raise
        lost = True
        raise LostError(
            f"another process is gone or cannot be reached; start all processes again with the same command ({e})"
        ) from e
    finally:
        if not lost:
            checkpoints.close()
            metrics.close()
