"""Parameters alone on disk, as Orbax writes them, with a SHA-256 of every file beside them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flaxcap.errors import UserError
from flaxcap.files import disk_space, integrity

_MARGIN_BYTES = 1 << 20  # what is around the arrays, in some forty small files


class CheckpointError(UserError):
    """A checkpoint that is missing or damaged, does not hold what is asked for, or cannot be written."""


def save_params(path: epath.PathLike, params: Any) -> None:
    """Arrays alone (a dict of dicts), in place of what is at `path`. Of several processes one may call it.

    CheckpointError or WriteError if they cannot be written.
    """
    path = absolute(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
        left.rmtree()
    check_space(path.parent, params)
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        try:
            checkpointer.save(path, params, force=True)
            checkpointer.wait_until_finished()
        except (ValueError, OSError) as e:
            raise CheckpointError(f"{path}: cannot be written ({e})") from e
    integrity.write_sums(path)


def load_params(path: epath.PathLike, expected: Any = None) -> Any:
    """What `save_params` wrote, on this host, as NumPy arrays. CheckpointError if there is none, or it is damaged.

    With `expected` (a tree of arrays, or of their shapes) also, before anything large is read, unless these are floats
    of the same names and shapes: a stranger's file may say any.
    """
    if not epath.Path(path).exists():
        raise CheckpointError(f"{path}: no parameters")
    check_files(epath.Path(path))
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
        try:
            found = checkpointer.metadata(absolute(path)).item_metadata
            if found is None:
                raise ValueError("its files are missing or damaged")
            if expected is not None:
                check_shapes(path, found.tree, expected)
                for x in jax.tree.leaves(found.tree):
                    whole = math.prod(x.storage.chunk_shape) <= math.prod(x.shape)
                    if not whole or not jnp.issubdtype(x.dtype, jnp.floating):
                        raise ValueError(f"found {x.dtype} in chunks of {x.storage.chunk_shape}, expected floats")
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
            return checkpointer.restore(absolute(path), restore_args=to_numpy)
        except CheckpointError:
            raise
        except Exception as e:  # for damaged files Orbax raises many kinds
            raise CheckpointError(f"{path}: cannot be read: {e}") from e


def _alone() -> ocp.options.MultiprocessingOptions:
    """For Orbax, which otherwise waits for all processes: this one acts alone."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )


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


def check_space(path: epath.Path, arrays: Any) -> None:
    """WriteError if a disk has no room for them: Orbax would notice in the midst of its work, and say too much."""
    needed = sum(x.nbytes for x in jax.tree.leaves(arrays)) + _MARGIN_BYTES
    disk_space.check(path, needed, "a checkpoint", "free some; the checkpoint before is kept")


def check_files(directory: epath.Path, among: Callable[[str], bool] = lambda name: True) -> None:
    for file, what in integrity.damages(directory, among=among):
        raise CheckpointError(f"{file}: {what}")


def absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if integrity.is_remote(path) else path.expanduser().resolve()
