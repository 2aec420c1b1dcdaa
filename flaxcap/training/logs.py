"""What a run says: metrics as JSON lines and for TensorBoard, and a clock that counts training alone."""

import json
import time
from typing import Any

import jax
import tensorboardX
from etils import epath

from flaxcap.files import integrity


class Clock:
    """Seconds spent training: not compiling, validating or saving. Saved in checkpoints, it survives restarts."""

    def __init__(self, progress: dict):
        self.seconds: float = progress.get("seconds", 0.0)  # up to the last pause
        self._since: float | None = None

    def run(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        self.seconds = self.now()
        self._since = None

    def now(self) -> float:
        """Seconds up to now."""
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)


class Profile:
    """A trace of a few dispatches for XProf (TensorBoard's profile plugin), or nothing without a directory."""

    FIRST, LAST = 3, 6  # dispatches: behind the first compilations, and few enough to be looked at

    def __init__(self, directory: epath.PathLike | None):
        self._directory, self._count, self._running = directory, 0, False

    def __enter__(self) -> "Profile":
        return self

    def dispatch(self, before: Any) -> None:
        """Comes before each dispatch; `before`, what those before it compute, is waited for at a trace's two ends."""
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
    """`metrics.jsonl` and TensorBoard's event files in a directory; on processes but the first, nothing.

    A run that goes on after step k loses the lines behind k: it will write them again. `scored`: the validation
    after step k too is behind it.
    """

    def __init__(self, workdir: epath.PathLike, step: int, scored: bool = True):
        def kept(line: dict) -> bool:
            return line["step"] < step or (line["step"] == step and (scored or "epoch" not in line))

        self._file = epath.Path(workdir) / "metrics.jsonl"
        self._lines: list[dict] = [line for line in read(workdir) if kept(line)]
        self._board: Any = None
        if jax.process_index() == 0:
            self._rewrite()
            if not integrity.is_remote(workdir):  # tensorboardX knows disks only
                self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._lines.append({"step": step, **values})
        if jax.process_index() != 0:
            return
        if integrity.is_remote(self._file):
            self._rewrite()  # object stores do not append
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
    """The lines of `metrics.jsonl`; a line that a kill cut short is left out."""
    file = epath.Path(workdir) / "metrics.jsonl"
    found = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return found
