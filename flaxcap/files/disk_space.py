"""Free space on disk, compared with what is about to be written."""

import shutil

from etils import epath

from flaxcap.files import integrity
from flaxcap.files.integrity import WriteError


def check(directory: epath.PathLike, needed: int, what: str, remedy: str) -> int | None:
    """Returns the free bytes of the disk that holds `directory`, or None for an object store.

    Args:
      directory: an existing directory.
      needed: bytes that will be written.
      what: what will be written, for the error message.
      remedy: what the user can do, for the error message.

    Raises:
      WriteError: fewer bytes are free than needed.
    """
    if integrity.is_remote(directory):
        return None
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise WriteError(
            f"{directory}: found {free / 1e6:.1f} MB free, expected {needed / 1e6:.1f} MB for {what}"
            f" (No space left on device); {remedy}"
        )
    return free
