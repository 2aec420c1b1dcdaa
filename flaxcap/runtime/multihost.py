"""Actions that process 0 takes for all processes of a run."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxcap.errors import UserError

_TEXT_BYTES = 4096


class FirstFailedError(UserError):
    """Raised on the other processes when an action of process 0 failed."""


def first_does(action: Callable[[], object]) -> None:
    """Calls `action` on process 0 while the other processes wait.

    Every process raises if it fails, so that none waits for a process that has ended.

    Raises:
      FirstFailedError: on the other processes, with the message of process 0's exception.
      Exception: on process 0, the exception of `action` itself.
    """
    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as e:
            failed = e
    if jax.process_count() > 1:
        text = (str(failed) or type(failed).__name__).encode()[:_TEXT_BYTES] if failed else b""
        received = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(_TEXT_BYTES, b"\0"), np.uint8))
        text = np.asarray(received).tobytes().rstrip(b"\0").decode(errors="replace")
        if text and jax.process_index() != 0:
            raise FirstFailedError(f"process 0 says: {text}")
    if failed is not None:
        raise failed
