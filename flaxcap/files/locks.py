"""One run at a time in a directory: a lock that ends with the process that holds it, however it ends."""

import contextlib
import errno
import fcntl
import io
import os
import socket
import time
from collections.abc import Iterator

from absl import logging
from etils import epath

from flaxcap.errors import UserError
from flaxcap.files import integrity
from flaxcap.runtime import multihost


class LockError(UserError):
    """Another process is at work there, or the lock cannot be written."""


@contextlib.contextmanager
def held(directory: epath.PathLike) -> Iterator[None]:
    """Inside, this run alone works in `directory`, which is made if it is not there. LockError if another does.

    Of several processes the first holds the lock, `directory/.lock`, for all. In object stores (`gs://…`) and on file
    systems without flock there is no lock.
    """
    path = epath.Path(directory)
    with contextlib.ExitStack() as stack:
        multihost.first_does(lambda: stack.enter_context(flock(path / ".lock", str(path))))
        yield


@contextlib.contextmanager
def flock(file: epath.Path, what: str, wait: bool = False) -> Iterator[None]:
    """Inside, this process alone holds `file`, the lock of `what`. Held by another, LockError, or it waits."""
    if integrity.is_remote(file):
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Never deleted: a lock on a file that has lost its name keeps nobody out.
        opened = open(file, "a+b", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise LockError(f"{file}: cannot be written ({e.strerror or e})") from e
    with opened:
        try:
            _take(opened, what, wait)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise
            logging.warning("%s: not locked, its file system knows no locks (%s)", what, e.strerror)
            yield
            return
        try:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            opened.truncate(0)
            opened.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode())
        except OSError as e:
            raise LockError(f"{file}: cannot be written ({e.strerror or e})") from e
        try:
            yield
        finally:
            opened.truncate(0)
            fcntl.flock(opened, fcntl.LOCK_UN)  # closing is not enough where a child has the file too


def _take(opened: io.FileIO, what: str, wait: bool) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        opened.seek(0)
        holder = opened.read().decode(errors="replace") or "another process"
    if not wait:
        raise LockError(f"{what}: in use by {holder}; wait until it ends, or take another directory")
    print(f"{what}: in use by {holder}; waiting until it ends")
    fcntl.flock(opened, fcntl.LOCK_EX)
