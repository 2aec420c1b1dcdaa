"""Checkpoints of a run (the best and the newest are kept), and parameters alone, as Orbax writes them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from flaxcap.errors import UserError
from flaxcap.train_step import TrainState


class CheckpointError(UserError):
    """A checkpoint that is missing, or does not hold what is asked for."""


class Checkpoints:
    """The checkpoints below a directory. Every process of a run makes one and calls the same methods."""

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
        self._manager = ocp.CheckpointManager(_absolute(path), options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best validation score; of the newest checkpoint before the first validation."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, progress: dict, score: float | None = None) -> None:
        """Saves in the background what is needed to go on; `progress` is any JSON. A step saved already is left."""
        if step in self._manager.all_steps():
            return
        params, rest = _apart(state)
        # Orbax ranks every checkpoint: one between validations comes last.
        metrics = {"score": -math.inf if score is None else score}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),  # pyright: ignore[reportCallIssue]
            rest=ocp.args.StandardSave(rest),  # pyright: ignore[reportCallIssue]
            progress=ocp.args.JsonSave(progress),  # pyright: ignore[reportCallIssue]
        )
        self._manager.save(step, args=items, metrics=metrics)

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
        saved = self._manager.item_metadata(step)["params"]
        # Beforehand: Orbax's own complaint leaves half-started reads behind.
        check_shapes(self.path / str(step), saved.tree if saved else {}, items["params"].item)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as e:
            raise CheckpointError(f"{self.path / str(step)}: cannot be restored: {e}") from e

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _apart(state: TrainState) -> tuple[Any, TrainState]:
    """The parameters to caption with, and the rest."""
    if state.average is None:
        return state.params, state._replace(params=None)  # pyright: ignore[reportArgumentType]
    return state.average, state._replace(average=None)


def check_shapes(where: object, found: Any, expected: Any) -> None:
    """CheckpointError, naming the first that differs, unless two trees have leaves of the same names and shapes."""
    shapes, right = (
        {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(x.shape) for k, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, expected))
    )
    wrong = [name for name in sorted(shapes | right) if shapes.get(name) != right.get(name)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {len(wrong)} parameters do not fit the preset: {name} has shape"
            f" {shapes.get(name, 'none (it is missing)')}, expected {right.get(name, 'none')}"
        )


def save_params(path: epath.PathLike, params: Any) -> None:
    """Arrays alone (a dict of dicts), to a new directory. Of several processes one may call it."""
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(_absolute(path), params, force=True)


def load_params(path: epath.PathLike) -> Any:
    """What `save_params` wrote, on this host, as NumPy arrays. CheckpointError if there is none."""
    if not epath.Path(path).exists():
        raise CheckpointError(f"{path}: no parameters")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
        try:
            found = checkpointer.metadata(_absolute(path)).item_metadata
            if found is None:
                raise ValueError("its files are missing or damaged")
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
            return checkpointer.restore(_absolute(path), restore_args=to_numpy)
        except (ValueError, KeyError, OSError) as e:
            raise CheckpointError(f"{path}: cannot be read: {e}") from e


def _alone() -> ocp.options.MultiprocessingOptions:
    """For Orbax, which otherwise waits for all processes: this one acts alone."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=x.sharding)


def _absolute(path: epath.PathLike) -> epath.Path:
    text = str(path)
    return epath.Path(text) if "://" in text else epath.Path(text).expanduser().resolve()
