"""Runs one measurement in a process of its own, within a time limit, and returns its record."""

import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

from accelerator_parts.plan import (
    DONE,
    FAILED,
    INTERRUPTED,
    SKIPPED,
    TIMEOUT,
    TINY_LEAST,
    Measurement,
    Record,
    read,
)

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent
ERROR_LINES = 12  # of a failed process's output, in its record


def has_torch() -> bool:
    """Returns whether PyTorch is installed."""
    try:
        return importlib.util.find_spec("torch") is not None
    except ImportError:
        return False


def environment(measurement: Measurement, scratch: pathlib.Path) -> dict[str, str]:
    """Returns the environment of a measurement. Temporary files and compiled programs go to `scratch`."""
    paths = [str(EXPERIMENTS), str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(scratch)}
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled"))
    # By default JAX takes 75% of a GPU's memory at its start, which leaves PyTorch too little.
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if measurement.needs_torch else {}
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        env["JAX_PLATFORMS"] = f"{platforms},cpu"  # the measurement "gradients" compares with a CPU
    return env


def execute(command: list[str], env: dict[str, str], log: pathlib.Path, timeout: float) -> int | None:
    """Runs a command and returns its status, or None if it was killed because it took too long.

    Args:
      command: program and arguments.
      env: its environment.
      log: receives its output.
      timeout: in seconds. The processes that the command started are killed with it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure(measurement: Measurement, out: pathlib.Path, scratch: pathlib.Path, left: float, tiny: bool) -> Record:
    """Runs a measurement, or skips it, and returns its record.

    Args:
      measurement: what to measure.
      out: the directory of logs.
      scratch: a directory for temporary files.
      left: seconds that are left.
      tiny: takes tiny sizes.
    """
    record: Record = {"name": measurement.name, "tiny": tiny, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    least = TINY_LEAST if tiny else measurement.least
    if measurement.needs_torch and not has_torch():
        return record | {"status": SKIPPED, "reason": "no torch"}
    if left < least:
        return record | {"status": SKIPPED, "reason": f"{max(left, 0):.0f} s left, needs {least} s"}
    part, log = scratch / f"{measurement.name}.json", out / "logs" / f"{measurement.name}.log"
    command = [sys.executable, "-m", "accelerator_parts.measure", measurement.name, str(part)]
    timeout, begin = min(left, measurement.most), time.perf_counter()
    status, reason = INTERRUPTED, "the command was interrupted"
    try:
        code = execute([*command, *(["--tiny"] if tiny else [])], environment(measurement, scratch), log, timeout)
        status, reason = DONE, ""
        if code is None:
            status, reason = TIMEOUT, f"killed after {timeout:.0f} s"
        elif code:
            status, reason = FAILED, f"ended with status {code}"
    except (KeyboardInterrupt, SystemExit):
        pass  # The caller ends the command once the record is written.
    record |= {"status": status, "reason": reason, "seconds": round(time.perf_counter() - begin, 1)}
    record |= read(part) or {}
    if status != DONE:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        record = {"problem": next(filter(None, reversed(lines)), "")} | record | {"error": lines[-ERROR_LINES:]}
    return record
