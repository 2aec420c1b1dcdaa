"""What the training loop keeps beside the state: how the run stands, a log line's steps, and why it may have to end."""

import math
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from flaxcap import config as config_lib
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.runtime import device_memory
from flaxcap.training import logs
from flaxcap.training.state import TrainState

SPIKE = 1.5  # times the mean loss of the log line before


class NotFinite(Exception):
    """Too many steps in a row were skipped, as their loss or gradient was not finite."""

    def __init__(self, first: int, count: int):
        """`first`: the number of the first of these steps, counted from 0."""
        super().__init__(f"steps {first} to {first + count - 1}")
        self.first, self.count = first, count


class Standing:
    """How the run stands by its validation scores, and what follows from it."""

    def __init__(self, config: config_lib.Train, progress: dict):
        self._config = config
        self.best: float = progress.get("best", -math.inf)
        self.since: int = progress.get("since", 0)  # epochs since the best

    @property
    def progress(self) -> dict:
        return {"best": self.best, "since": self.since}

    @property
    def stop(self) -> bool:
        return 0 < self._config.stop_after <= self.since

    def after(self, score: float, state: TrainState) -> TrainState:
        """Notes an epoch's score; the state to go on with."""
        c = self._config
        better = score > self.best
        self.best, self.since = max(score, self.best), 0 if better else self.since + 1
        if c.schedule != "plateau" or not self.since or self.since % c.plateau_epochs:
            return state
        rate = np.asarray(jax.device_get(state.rate) * np.float32(c.plateau_factor))
        return state._replace(rate=jax.device_put(rate, state.rate.sharding))


class Window:
    """The steps between two lines of the log; their metrics stay on the device until the line is written.

    What a run saves of it (`progress`) makes the line of a run that was interrupted within it that of one that was
    not.
    """

    def __init__(self, metrics: logs.Metrics, clock: logs.Clock, step: int, max_bad_steps: int, progress: dict):
        """`step`: the run's next. `max_bad_steps`: so many in a row raise `NotFinite` when they are seen."""
        self._metrics, self._clock, self._max_bad_steps = metrics, clock, max_bad_steps
        self._next = step  # of those that are not yet counted
        self._since: float = progress.get("since_s", clock.seconds)
        self._sums: dict[str, float] = progress.get("sums", {})
        self._typical: float = progress.get("typical", math.inf)  # loss
        self._in_a_row: int = progress.get("in_a_row", 0)  # bad steps
        self._steps: list[tuple[int, Mapping[str, jax.Array | np.ndarray]]] = []
        self._closed: tuple[int, list] | None = None

    def add(self, count: int, metrics: Mapping[str, jax.Array | np.ndarray]) -> None:
        """The metrics of a dispatch: arrays of which the first `count` entries are meant, the others 0."""
        self._steps.append((count, metrics))

    def close(self, step: int) -> None:
        """The line of `step` tells of the steps added so far."""
        self._closed, self._steps = (step, self._steps), []

    def progress(self) -> dict:
        """Of a window that is not closed, waiting for its last step; any JSON."""
        self._count(self._steps)
        self._steps = []
        return {
            "since_s": self._since,
            "sums": self._sums,
            "typical": self._typical,
            "in_a_row": self._in_a_row,
        }

    def write(self) -> dict[str, str] | None:
        """Writes the closed window's line, waiting for its last step; what a progress bar shows of it."""
        if self._closed is None:
            return None
        (step, steps), self._closed = self._closed, None
        self._count(steps)
        sums, self._sums = self._sums, {}
        seconds = max(self._clock.now() - self._since, 1e-9)
        self._since += seconds
        good = sums["steps"] - sums["skipped"]
        values = {
            "train/loss": sums["nats"] / sums["tokens"] if good else math.nan,
            "train/accuracy": sums["right"] / sums["tokens"] if good else math.nan,
            "train/grad_norm": sums["grad_norm"] / good if good else math.nan,
            "train/learning_rate": sums["learning_rate"],
            "captions_per_s": sums["captions"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
        }
        if good:
            self._typical = values["train/loss"]
        if sums["cider_d"]:  # self-critical training's captions
            values["train/cider_d"] = sums["cider_d"] / sums["steps"]
        for name in ("skipped", "spikes"):
            if sums[name]:
                values[f"train/{name}"] = sums[name]
        self._metrics.write(step, values)
        return {"loss": f"{values['train/loss']:.3f}", "captions/s": f"{values['captions_per_s']:.0f}"}

    def _count(self, steps: list) -> None:
        """Adds steps to the sums, one after the other, so that it does not matter where a dispatch or a run ended."""
        summed = "nats", "tokens", "right", "captions", "grad_norm", "skipped", "cider_d"
        sums = dict.fromkeys((*summed, "spikes", "steps"), 0.0) | self._sums
        for count, metrics in jax.device_get(steps):
            for j in range(count):
                of_step = {name: float(values[j]) for name, values in metrics.items()}
                for name in summed:
                    sums[name] += of_step.get(name, 0.0)
                sums["steps"] += 1
                sums["learning_rate"] = of_step["learning_rate"]
                sums["spikes"] += self._judge(of_step)
        self._sums = sums

    def _judge(self, of_step: dict[str, float]) -> bool:
        """Whether the next step's loss is a spike; both what is and what is not finite are told of."""
        step, loss = self._next, of_step["loss"]
        self._next += 1
        if of_step["skipped"]:
            self._in_a_row += 1
            if self._in_a_row == 1:
                _say(f"step {step}: its loss or gradient is not finite (loss {loss:.4g}); skipped")
            if self._in_a_row >= self._max_bad_steps:
                raise NotFinite(step + 1 - self._in_a_row, self._in_a_row)
            return False
        self._in_a_row = 0
        spike = loss > SPIKE * self._typical
        if spike:
            _say(f"step {step}: loss spike, {loss:.4f} nats a token, {self._typical:.4f} in the log line before")
        return spike


def _say(text: str) -> None:
    if jax.process_index() == 0:
        tqdm.tqdm.write(text)


class Preemption:
    """Inside, a SIGTERM is noted instead of ending the process; of several processes all end after the same step."""

    def __init__(self) -> None:
        self._received, self._asked = False, 0
        # With several processes JAX takes the signal, and tells the others.
        self._alone = jax.process_count() == 1

    def noted(self) -> bool:
        """Whether to end what is under way; never with several processes, which would have to do it as one."""
        return self._alone and self._received

    def reached(self) -> bool:
        """Whether to save and end now; every process asks after each dispatch."""
        if self._alone:
            return self._received
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def __enter__(self) -> "Preemption":
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before: Any = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._alone and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self._received = True


class Compiled(dict):
    """The step for each length that it meets, compiled when it does."""

    def __init__(self, train_step: Any, state: TrainState, feed: Feed):
        self._train_step, self._feed = train_step, feed
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    def __missing__(self, length: int) -> jax.stages.Compiled:
        self[length] = self._compile(None, length)
        return self[length]

    def check(self, images: int, length: int) -> int:
        """The bytes that the longest step needs on each device; ConfigError if it has less."""

        def compile_for(n: int) -> jax.stages.Compiled:
            return self[length] if n == images else self._compile(n, length)

        return device_memory.check(compile_for, images, jax.local_devices(), jax.device_count())

    def _compile(self, images: int | None, length: int) -> jax.stages.Compiled:
        return self._train_step.lower(self._state, self._feed.spec(length, images)).compile()
