"""Parameters on disk: Orbax's files, and a SHA-256 of each."""

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
from flaxcap.runtime import library_logs

library_logs.hide()

_METADATA_BYTES = 1 << 20  # Orbax 0.12 writes about forty small files beside the arrays


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model, or cannot be written."""


def save_params(path: epath.PathLike, params: Any) -> None:
    """Writes a dict of dicts of arrays, and replaces what is at `path`. One process alone calls it.

    Raises:
      CheckpointError: Orbax cannot write the arrays.
      WriteError: the disk is too small, or the checksums cannot be written.
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
    integrity.write_checksums(path)


def load_params(path: epath.PathLike, expected: Any = None) -> Any:
    """Reads what `save_params` wrote, as NumPy arrays. Every process that calls it reads for itself.

    Args:
      path: the directory.
      expected: a tree of arrays or of shapes, for files from untrusted sources. Names, shapes and dtypes are compared
        with it before an array is read: a small file can declare an array of any size.

    Raises:
      CheckpointError: the parameters are missing or damaged, or are not floats of the expected names and shapes.
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
                    fits = math.prod(x.storage.chunk_shape) <= math.prod(x.shape)
                    if not fits or not jnp.issubdtype(x.dtype, jnp.floating):
                        raise ValueError(f"found {x.dtype} in chunks of {x.storage.chunk_shape}, expected floats")
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
            return checkpointer.restore(absolute(path), restore_args=to_numpy)
        except CheckpointError:
            raise
        except Exception as e:  # Orbax 0.12 raises exceptions of many types for damaged files
            raise CheckpointError(f"{path}: cannot be read: {e}") from e


def _alone() -> ocp.options.MultiprocessingOptions:
    """Returns options for one process that acts alone. By default Orbax waits for all processes."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )


def check_shapes(where: object, found: Any, expected: Any) -> None:
    """Compares the names and shapes of two trees' leaves.

    Args:
      where: the file or flag that holds the parameters, for the error message.
      found: a tree of arrays or of shapes.
      expected: another.

    Raises:
      CheckpointError: a name or a shape differs. The message names the first one.
    """
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
    """Checks that a disk has room for arrays. Orbax notices a full disk only while it writes.

    Raises:
      WriteError: the disk is too small.
    """
    needed = sum(x.nbytes for x in jax.tree.leaves(arrays)) + _METADATA_BYTES
    disk_space.check(path, needed, "a checkpoint", "the checkpoint before is kept; free some space")


def check_files(directory: epath.Path, among: Callable[[str], bool] = lambda name: True) -> None:
    """Compares the files of a directory that `among` selects by name with their checksums.

    Raises:
      CheckpointError: a file is missing or damaged.
    """
    for file, what in integrity.find_damage(directory, among=among):
        raise CheckpointError(f"{file}: {what}")


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path, which Orbax requires, with `~` expanded."""
    path = epath.Path(path)
    return path if integrity.is_remote(path) else path.expanduser().resolve()
