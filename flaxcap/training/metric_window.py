"""The metrics of the steps between two log lines."""

import math
from collections.abc import Mapping

import jax
import numpy as np
import tqdm

from flaxcap.training import logs

SPIKE = 1.5  # a spike's loss is more than this multiple of the mean loss of the last log line
SUMMED = "nats", "tokens", "right", "captions", "grad_norm", "skipped", "cider_d"


class TooManyBadSteps(Exception):
    """Too many steps in a row had a loss or gradient that was not finite."""

    def __init__(self, first: int, count: int):
        """Names the steps.

        Args:
          first: number of the first of these steps, counted from 0.
          count: number of these steps.
        """
        super().__init__(f"steps {first} to {first + count - 1}")
        self.first, self.count = first, count


class MetricWindow:
    """Sums the metrics of steps and writes them as a log line.

    Metrics stay on the device until their line is written: the host does not wait for the last step. `progress` is
    saved with a checkpoint, so that a resumed run writes the line of an uninterrupted run.
    """

    def __init__(self, metrics: logs.Metrics, clock: logs.Clock, step: int, max_bad_steps: int, progress: dict):
        """Opens a window.

        Args:
          metrics: receives the lines.
          clock: seconds of training.
          step: number of the first step to come.
          max_bad_steps: steps in a row that are not finite before `TooManyBadSteps` is raised.
          progress: of an earlier window, from a checkpoint; {}: none.
        """
        self._metrics, self._clock, self._max_bad_steps = metrics, clock, max_bad_steps
        self._next = step  # first step that is not counted yet
        self._since: float = progress.get("since_s", clock.seconds)
        self._sums: dict[str, float] = progress.get("sums", {})
        self._typical: float = progress.get("typical", math.inf)  # mean loss of the last line
        self._in_a_row: int = progress.get("in_a_row", 0)  # bad steps
        self._steps: list[tuple[int, Mapping[str, jax.Array | np.ndarray]]] = []
        self._closed: tuple[int, list] | None = None

    def add(self, count: int, metrics: Mapping[str, jax.Array | np.ndarray]) -> None:
        """Adds the metrics of a dispatch: arrays whose first `count` entries are steps; the rest is padding."""
        self._steps.append((count, metrics))

    def close(self, step: int) -> None:
        """Ends the window: the steps added so far form the line of `step`."""
        self._closed, self._steps = (step, self._steps), []

    def progress(self) -> dict:
        """Returns the state of the open window, any JSON. It waits for the last step."""
        self._count(self._steps)
        self._steps = []
        return {
            "since_s": self._since,
            "sums": self._sums,
            "typical": self._typical,
            "in_a_row": self._in_a_row,
        }

    def write(self) -> dict[str, str] | None:
        """Writes the line of the closed window and returns its summary for a progress bar; it waits for the last step.

        Raises:
          TooManyBadSteps: `max_bad_steps` in a row were not finite.
        """
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
        if sums["cider_d"]:  # only self-critical training has it
            values["train/cider_d"] = sums["cider_d"] / sums["steps"]
        for name in ("skipped", "spikes"):
            if sums[name]:
                values[f"train/{name}"] = sums[name]
        self._metrics.write(step, values)
        return {"loss": f"{values['train/loss']:.3f}", "captions/s": f"{values['captions_per_s']:.0f}"}

    def _count(self, steps: list) -> None:
        """Adds steps to the sums one by one: the sums do not depend on where a dispatch or a run ended."""
        sums = dict.fromkeys((*SUMMED, "spikes", "steps"), 0.0) | self._sums
        for count, metrics in jax.device_get(steps):
            for j in range(count):
                of_step = {name: float(values[j]) for name, values in metrics.items()}
                for name in SUMMED:
                    sums[name] += of_step.get(name, 0.0)
                sums["steps"] += 1
                sums["learning_rate"] = of_step["learning_rate"]
                sums["spikes"] += self._is_spike(of_step)
        self._sums = sums

    def _is_spike(self, of_step: dict[str, float]) -> bool:
        """Returns whether the next step's loss is a spike. Logs spikes and the first bad step of a row."""
        step, loss = self._next, of_step["loss"]
        self._next += 1
        if of_step["skipped"]:
            self._in_a_row += 1
            if self._in_a_row == 1:
                _print(f"step {step}: loss or gradient is not finite (loss {loss:.4g}); skipped")
            if self._in_a_row >= self._max_bad_steps:
                raise TooManyBadSteps(step + 1 - self._in_a_row, self._in_a_row)
            return False
        self._in_a_row = 0
        spike = loss > SPIKE * self._typical
        if spike:
            _print(f"step {step}: loss spike, {loss:.4f} nats a token; last log line: {self._typical:.4f}")
        return spike


def _print(text: str) -> None:
    if jax.process_index() == 0:
        tqdm.tqdm.write(text)
