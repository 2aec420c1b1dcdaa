"""Locks that keep a second program out of a directory. A lock ends with the process that holds it."""

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
    """A directory that another process has locked, or a lock that cannot be written."""


@contextlib.contextmanager
def held(directory: epath.PathLike) -> Iterator[None]:
    """Holds `directory/.lock` inside a `with` block. A missing directory is created.

    Process 0 of a multi-process program holds the lock for all its processes. There is no lock in object stores
    (`gs://…`) and on file systems without flock.

    Raises:
      LockError: another program holds the lock.
    """
    path = epath.Path(directory)
    with contextlib.ExitStack() as stack:
        multihost.first_does(lambda: stack.enter_context(flock(path / ".lock", str(path))))
        yield


@contextlib.contextmanager
def flock(file: epath.Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock `file` inside a `with` block.

    Args:
      file: the lock; its text names the process that holds it.
      what: what is locked, for messages.
      wait: waits while another process holds the lock.

    Raises:
      LockError: another process holds the lock and `wait` is False, or the file cannot be written.
    """
    if integrity.is_remote(file):
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The file is never deleted: a process that locks a new file of this name would not meet the old lock.
        opened = open(file, "a+b", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise LockError(f"{file}: cannot be written ({e.strerror or e})") from e
    with opened:
        try:
            _take(opened, what, wait)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise
            logging.warning("%s: not locked, its file system has no locks (%s)", what, e.strerror)
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
            # Closing alone keeps the lock while a child process has inherited the file.
            fcntl.flock(opened, fcntl.LOCK_UN)


def _take(opened: io.FileIO, what: str, wait: bool) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        opened.seek(0)
        holder = opened.read().decode(errors="replace") or "another process"
    if not wait:
        raise LockError(f"{what}: in use by {holder}; wait until it ends, or choose another directory")
    print(f"{what}: in use by {holder}; waiting until it ends")
    fcntl.flock(opened, fcntl.LOCK_EX)
