"""Checkpoints of a run (the best and the newest are kept), and parameters alone, as Orbax writes them.

Beside Orbax's files each directory holds their SHA-256 (see checksums.py): Orbax's own do not cover every byte.
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
    """The checkpoints below a directory. Every process of a run makes one and calls the same methods.

    CheckpointError if the checkpoints that are there cannot be read.
    """

    def __init__(self, path: epath.PathLike, keep_latest: int = 1):
        def score(metrics: Any) -> float:
            return metrics["score"]

        # best_fn with max_to_keep would delete the newest checkpoint whenever it is not the best.
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_latest),
                checkpoint_managers.BestN(get_metric_fn=score, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=score, best_mode="max")
        self.path = epath.Path(path)
        # Named here, since a manager that has saved nothing yet could not read the metadata otherwise.
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        for step in steps(path):  # what the manager reads of every step
            params_lib.check_files(step, lambda name: not name.startswith(("params/", "rest/", "progress/")))
        try:
            self._manager = ocp.CheckpointManager(params_lib.absolute(path), options=options, item_handlers=handlers)
        except (ValueError, KeyError, TypeError, OSError) as e:
            raise CheckpointError(f"{path}: cannot be opened ({e})") from e
        self._pool = ThreadPoolExecutor(1, "checksums")
        self._sums: Future | None = None

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best validation score; of the newest checkpoint before the first validation."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, progress: dict, score: float | None = None) -> None:
        """Saves in the background what is needed to go on; `progress` is any JSON. A step saved already is left.

        CheckpointError, here or in what is called next, if it cannot be written: the last one is kept then.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        params_lib.check_space(self.path, state)
        params, rest = _apart(state)
        # Orbax ranks every checkpoint: one between validations comes last.
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
        """Makes room for another of the same step."""
        self.wait()
        self._manager.delete(step)

    def _write_sums(self, step: int) -> None:
        self._manager.wait_until_finished()
        integrity.write_checksums(self.path / str(step))

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The newest state, sharded as `like` (arrays, or their shapes with shardings), and its progress."""
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"{self.path}: no checkpoint")
        params, rest = _apart(jax.tree.map(_abstract, like))
        found = self._restore(
            step,
            params=ocp.args.StandardRestore(params),  # pyright: ignore[reportCallIssue]
            rest=ocp.args.StandardRestore(rest),  # pyright: ignore[reportCallIssue]
            progress=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
        )
        whole = {"params": found.params} if like.average is None else {"average": found.params}
        return found.rest._replace(**whole), found.progress

    def restore_params(self, like: Any, step: int) -> Any:
        """The parameters of a step, sharded as `like`."""
        like = jax.tree.map(_abstract, like)
        return self._restore(step, params=ocp.args.StandardRestore(like)).params  # pyright: ignore[reportCallIssue]

    def _restore(self, step: int, **items: Any) -> Any:
        self.wait()
        multihost.first_does(lambda: params_lib.check_files(self.path / str(step)))
        saved = self._manager.item_metadata(step)["params"]
        # Beforehand: Orbax's own complaint leaves half-started reads behind.
        params_lib.check_shapes(self.path / str(step), saved.tree if saved else {}, items["params"].item)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as e:
            raise CheckpointError(f"{self.path / str(step)}: cannot be restored: {e}") from e

    def wait(self) -> None:
        """Until what was saved, and its checksums, are on disk. CheckpointError if they cannot be."""
        try:
            self._manager.wait_until_finished()
            if self._sums is not None:
                self._sums.result()
        except (ValueError, OSError) as e:
            raise self._unwritten(e) from e

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path}: a checkpoint cannot be written ({error}); the one before is kept")


def steps(path: epath.PathLike) -> list[epath.Path]:
    """The directories of the checkpoints below `path` that were written to their end, the newest last."""
    found = ocp.path.step.standard_name_format().find_all(params_lib.absolute(path))
    return [metadata.path for metadata in sorted(found, key=lambda metadata: metadata.step)]


def mend(path: epath.PathLike) -> None:
    """Deletes what was left of saves that were cut off, and sets damaged checkpoints aside, beside `path`.

    CheckpointError if there are only damaged ones: they are left where they are. For the process that alone writes.
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
        raise CheckpointError(f"{file}: {what}; no checkpoint is sound; delete {path} to begin anew")
    for step, (file, what) in damaged.items():
        aside = path.with_name(f"{path.name}-damaged") / step.name
        print(f"{file}: {what}; the checkpoint is set aside: {aside}")
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            aside.rmtree()
        step.rename(aside)


def _apart(state: TrainState) -> tuple[Any, TrainState]:
    """The parameters to caption with, and the rest."""
    if state.average is None:
        return state.params, state._replace(params=None)  # pyright: ignore[reportArgumentType]
    return state.average, state._replace(average=None)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=x.sharding)
