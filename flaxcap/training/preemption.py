"""Preemption: a SIGTERM ends a run after the current dispatch, with a checkpoint."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context in which SIGTERM is recorded and does not end the process.

    With several processes JAX handles the signal, and all processes agree on the step after which they end.
    """

    def __init__(self) -> None:
        self._received, self._asked = False, 0
        self._alone = jax.process_count() == 1

    def received(self) -> bool:
        """Returns whether to interrupt a validation; with several processes never, as they must act together."""
        return self._alone and self._received

    def reached(self) -> bool:
        """Returns whether to save and end now. Every process must call it after every dispatch."""
        if self._alone:
            return self._received
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def __enter__(self) -> "Preemption":
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before: Any = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._alone and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, *_: object) -> None:
        self._received = True
