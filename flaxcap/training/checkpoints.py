"""The checkpoints of a run, written by Orbax: the best and the newest are kept.

Each directory also holds the SHA-256 of its files, see integrity.py. Orbax 0.12 checks only a part of the bytes that it
reads.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from flaxcap.files import integrity
from flaxcap.files import params as params_lib
from flaxcap.files.params import CheckpointError
from flaxcap.runtime import multihost
from flaxcap.training.state import TrainState


class Checkpoints:
    """The checkpoints in a directory. Every process of a run must call the same methods in the same order."""

    def __init__(self, path: epath.PathLike, keep_latest: int = 1):
        """Opens the directory, which need not exist.

        Args:
          path: holds one directory for each checkpoint.
          keep_latest: number of newest checkpoints that are kept beside the best.

        Raises:
          CheckpointError: existing checkpoints cannot be read.
        """

        def score(metrics: Any) -> float:
            return metrics["score"]

        # Orbax's max_to_keep with best_fn deletes the newest checkpoint if its score is not the best (Orbax 0.12).
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_latest),
                checkpoint_managers.BestN(get_metric_fn=score, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=score, best_mode="max")
        self.path = epath.Path(path)
        # Without handlers, a manager that has saved nothing cannot read the metadata of items (Orbax 0.12).
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        for step in steps(path):  # the manager reads these files of every step
            params_lib.check_files(step, lambda name: not name.startswith(("params/", "rest/", "progress/")))
        try:
            self._manager = ocp.CheckpointManager(params_lib.absolute(path), options=options, item_handlers=handlers)
        except (ValueError, KeyError, TypeError, OSError) as e:
            raise CheckpointError(f"{path}: cannot be opened ({e})") from e
        self._pool = ThreadPoolExecutor(1, "checksums")
        self._sums: Future | None = None

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best validation score; before the first validation that of the newest checkpoint."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, progress: dict, score: float | None = None) -> None:
        """Saves a checkpoint in the background; does nothing if the step has one.

        Args:
          step: number of the checkpoint.
          state: of the run.
          progress: any JSON, restored with the state.
          score: of the validation; None: not validated.

        Raises:
          CheckpointError: a checkpoint cannot be written, this one or the last; earlier ones are kept.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        params_lib.check_space(self.path, state)
        params, rest = _split(state)
        # Orbax ranks every checkpoint by score. One without a validation ranks last.
        metrics = {"score": -math.inf if score is None else score}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),  # pyright: ignore[reportCallIssue]
            rest=ocp.args.StandardSave(rest),  # pyright: ignore[reportCallIssue]
            progress=ocp.args.JsonSave(progress),  # pyright: ignore[reportCallIssue]
        )
        try:
            self._manager.save(step, args=items, metrics=metrics)
        except (ValueError, OSError) as e:
            raise self._unwritten(e) from e
        if jax.process_index() == 0:
            self._sums = self._pool.submit(self._write_sums, step)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, so that its step can be saved again."""
        self.wait()
        self._manager.delete(step)

    def _write_sums(self, step: int) -> None:
        self._manager.wait_until_finished()
        integrity.write_checksums(self.path / str(step))

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """Returns the newest state and its progress.

        Args:
          like: gives shapes and shardings; arrays or ShapeDtypeStructs.

        Raises:
          CheckpointError: there is no checkpoint, or it is damaged, or its shapes differ.
        """
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"{self.path}: no checkpoint")
        params, rest = _split(jax.tree.map(_abstract, like))
        found = self._restore(
            step,
            params=ocp.args.StandardRestore(params),  # pyright: ignore[reportCallIssue]
            rest=ocp.args.StandardRestore(rest),  # pyright: ignore[reportCallIssue]
            progress=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
        )
        best = {"params": found.params} if like.average is None else {"average": found.params}
        return found.rest._replace(**best), found.progress

    def restore_params(self, like: Any, step: int) -> Any:
        """Returns the parameters to caption with, saved at `step`, sharded as `like`."""
        like = jax.tree.map(_abstract, like)
        return self._restore(step, params=ocp.args.StandardRestore(like)).params  # pyright: ignore[reportCallIssue]

    def _restore(self, step: int, **items: Any) -> Any:
        self.wait()
        multihost.first_does(lambda: params_lib.check_files(self.path / str(step)))
        saved = self._manager.item_metadata(step)["params"]
        # If shapes differ, Orbax 0.12 raises while reads are still running; this check comes before any read.
        params_lib.check_shapes(self.path / str(step), saved.tree if saved else {}, items["params"].item)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as e:
            raise CheckpointError(f"{self.path / str(step)}: cannot be restored: {e}") from e

    def wait(self) -> None:
        """Waits until the last checkpoint and its checksums are on disk.

        Raises:
          CheckpointError: they cannot be written.
        """
        try:
            self._manager.wait_until_finished()
            if self._sums is not None:
                self._sums.result()
        except (ValueError, OSError) as e:
            raise self._unwritten(e) from e

    def close(self) -> None:
        """Waits for the last checkpoint and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path}: a checkpoint cannot be written ({error}); the last one is kept")


def steps(path: epath.PathLike) -> list[epath.Path]:
    """Returns the directories of complete checkpoints in `path`, the newest last."""
    found = ocp.path.step.standard_name_format().find_all(params_lib.absolute(path))
    return [metadata.path for metadata in sorted(found, key=lambda metadata: metadata.step)]


def repair(path: epath.PathLike) -> None:
    """Deletes incomplete checkpoints and moves damaged ones to `{path}-damaged`. Only one process may call it.

    Raises:
      CheckpointError: all checkpoints are damaged; they are not moved.
    """
    path = params_lib.absolute(path)
    if not path.exists():
        return
    for left in path.glob("*.orbax-checkpoint-tmp*"):
        left.rmtree()
    for step in steps(path):
        if not (step / integrity.CHECKSUMS).exists():  # killed between Orbax's last rename and the writing of the sums
            integrity.write_checksums(step)
    found = {step: next(integrity.find_damage(step), None) for step in steps(path)}
    damaged = {step: damage for step, damage in found.items() if damage}
    if damaged and len(damaged) == len(found):
        file, what = next(iter(damaged.values()))
        raise CheckpointError(f"{file}: {what}; every checkpoint is damaged; delete {path} to start again")
    for step, (file, what) in damaged.items():
        aside = path.with_name(f"{path.name}-damaged") / step.name
        print(f"{file}: {what}; the checkpoint is set aside: {aside}")
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            aside.rmtree()
        step.rename(aside)


def _split(state: TrainState) -> tuple[Any, TrainState]:
    """Returns the parameters to caption with, and the rest of the state."""
    if state.average is None:
        return state.params, state._replace(params=None)  # pyright: ignore[reportArgumentType]
    return state.average, state._replace(average=None)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=x.sharding)
