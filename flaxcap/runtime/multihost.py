"""What one process of a run does for all of them."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxcap.errors import UserError

_TEXT_BYTES = 4096


class FirstFailedError(UserError):
    """Process 0 could not do what it does for all."""


def first_does(action: Callable[[], object]) -> None:
    """Process 0 calls `action`, the others wait for it. Where it fails all fail: none waits for one that is gone."""
    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as e:
            failed = e
    if jax.process_count() > 1:
        text = (str(failed) or type(failed).__name__).encode()[:_TEXT_BYTES] if failed else b""
        told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(_TEXT_BYTES, b"\0"), np.uint8))
        text = np.asarray(told).tobytes().rstrip(b"\0").decode(errors="replace")
        if text and jax.process_index() != 0:
            raise FirstFailedError(f"process 0 says: {text}")
    if failed is not None:
        raise failed
