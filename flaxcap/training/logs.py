"""Metrics as JSON lines and for TensorBoard, the clock of training, and profiles."""

import json
import time
from typing import Any

import jax
import tensorboardX
from etils import epath

from flaxcap.files import integrity


class Clock:
    """Counts the seconds of training, without those of compiling, validating and saving."""

    def __init__(self, progress: dict):
        """Starts paused, at the `seconds` of a checkpoint's progress; {}: at 0."""
        self.seconds: float = progress.get("seconds", 0.0)  # up to the last pause
        self._since: float | None = None

    def run(self) -> None:
        """Starts the clock, or lets it run."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock until `run`."""
        self.seconds = self.now()
        self._since = None

    def now(self) -> float:
        """Returns the seconds up to now."""
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)


class Profile:
    """Writes a trace of a few dispatches for XProf, which is also TensorBoard's profile plugin."""

    FIRST, LAST = 3, 6  # dispatches: after the first compilations; few, as a trace of many is slow to open

    def __init__(self, directory: epath.PathLike | None):
        """Writes no trace yet; None: never."""
        self._directory, self._count, self._running = directory, 0, False

    def __enter__(self) -> "Profile":
        return self

    def dispatch(self, before: Any) -> None:
        """Must be called before each dispatch. `before`: results of the last dispatch; a trace waits for them."""
        self._count += 1
        if self._directory is None or self._count not in (self.FIRST, self.LAST):
            return
        jax.block_until_ready(before)
        if self._count == self.FIRST:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        else:
            self._stop()

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"profile: {self._directory}; `xprof {self._directory}` shows it (pip install xprof)")


class Metrics:
    """Writes `metrics.jsonl` and TensorBoard's event files; only the first process writes."""

    def __init__(self, workdir: epath.PathLike, step: int, scored: bool = True):
        """Opens the files and deletes the lines that the run will write again.

        Args:
          workdir: holds the files.
          step: the last step of the run so far.
          scored: False: the line of the validation after `step` is deleted too.
        """

        def kept(line: dict) -> bool:
            return line["step"] < step or (line["step"] == step and (scored or "epoch" not in line))

        self._file = epath.Path(workdir) / "metrics.jsonl"
        self._lines: list[dict] = [line for line in read(workdir) if kept(line)]
        self._board: Any = None
        if jax.process_index() == 0:
            self._rewrite()
            if not integrity.is_remote(workdir):  # tensorboardX 2.6 writes only to disks
                self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a line at once."""
        self._lines.append({"step": step, **values})
        if jax.process_index() != 0:
            return
        if integrity.is_remote(self._file):
            self._rewrite()  # object stores cannot append
        else:
            with self._file.open("a") as f:
                f.write(json.dumps(self._lines[-1]) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _rewrite(self) -> None:
        integrity.write_atomically(self._file, "".join(json.dumps(line) + "\n" for line in self._lines))


def read(workdir: epath.PathLike) -> list[dict]:
    """Returns the lines of `metrics.jsonl`, up to a line that a kill cut short."""
    file = epath.Path(workdir) / "metrics.jsonl"
    found = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return found
