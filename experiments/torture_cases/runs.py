"""Cases of training: killed, preempted, moved to other devices, given features that are not finite."""

import dataclasses
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
from torture_cases.workbench import Workbench, differences, lines, newest, result, small_config, times

from flaxcap.features.store import Store, path_for

PREEMPTED = 75
PREEMPTED_WITHIN_S = 30
DIES_WITHIN_S = 120


def in_a_save(workdir: pathlib.Path) -> bool:
    """Returns true while a checkpoint is being written."""
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def written(workdir: pathlib.Path) -> int:
    """Counts the lines of a run's log."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def await_any_moment(
    process: subprocess.Popen,
    workdir: pathlib.Path,
    undisturbed: pathlib.Path,
    rng: random.Random,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Waits for a random moment in the rest of a run.

    Args:
      process: of the run.
      workdir: of the run. Progress is the number of lines in its log.
      undisturbed: the workdir of an equal run that has finished.
      rng: draws the moment.
      stop: ends the waiting as soon as it returns true.

    Returns:
      True if `stop` ended the waiting.
    """
    until = rng.randint(written(workdir), written(undisturbed))
    while process.poll() is None and written(workdir) < until:
        if stop():
            return True
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))
    return False


Disturb = Callable[[subprocess.Popen, pathlib.Path, int], bool]  # (process, workdir, number) -> disturbed or not
MOST = 10  # disturbances of one run


def _tortured(
    bench: Workbench, scratch: pathlib.Path, count: int, disturb: Disturb, lost: list[str]
) -> tuple[int, int]:
    """Disturbs runs at least `count` times together. Each finished run must be bit-equal to an undisturbed one.

    Args:
      bench: starts the runs.
      scratch: holds the runs, and the undisturbed one in `undisturbed`.
      count: disturbances.
      disturb: disturbs a process, or returns false if the process had ended.
      lost: receives the differences.

    Returns:
      The number of disturbances and the number of runs.

    Raises:
      RuntimeError: an undisturbed process failed.
    """
    done = number = 0
    while done < count:
        workdir = scratch / f"run{number}"
        for n in range(MOST + 1):
            process = bench.train(workdir)
            disturbed = n < MOST and disturb(process, workdir, n)
            out, _ = process.communicate()
            if process.returncode == 0:
                break
            if not disturbed:
                raise RuntimeError(out)
            done += 1
        lost += differences(workdir, scratch / "undisturbed", f"run {number}")
        number += 1
    return done, number


def train_killed(scratch: pathlib.Path, scale: float) -> dict:
    """Kills runs at random moments, many of them inside a save. They end bit-equal to an undisturbed run."""
    bench, rng, lost = Workbench(scratch), random.Random(0), []
    bench.finish(scratch / "warm")
    bench.finish(scratch / "undisturbed")
    saves = 0

    def kill(process: subprocess.Popen, workdir: pathlib.Path, n: int) -> bool:
        nonlocal saves

        def saving() -> bool:
            return n % 2 == 1 and in_a_save(workdir) and rng.random() < 0.05

        if rng.random() < 0.2:  # while the process starts
            time.sleep(rng.uniform(0, 6))
        else:
            saves += await_any_moment(process, workdir, scratch / "undisturbed", rng, saving)
        process.kill()
        return True

    kills, runs = _tortured(bench, scratch, times(scale, 50), kill, lost)
    return result("train_killed", kills, lost, runs_compared=runs, inside_a_save=saves)


def train_preempted(scratch: pathlib.Path, scale: float) -> dict:
    """Sends SIGTERM at random moments. Runs save, exit with status 75 within 30 s, and end bit-equal."""
    bench, rng, lost = Workbench(scratch), random.Random(1), []
    bench.finish(scratch / "warm")
    bench.finish(scratch / "undisturbed")
    worst = 0.0

    def stop(process: subprocess.Popen, workdir: pathlib.Path, _: int) -> bool:
        nonlocal worst
        await_any_moment(process, workdir, scratch / "undisturbed", rng)
        if process.poll() is not None:
            return False
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PREEMPTED_WITHIN_S)
        except subprocess.TimeoutExpired:
            lost.append(f"{workdir.name}: still running {PREEMPTED_WITHIN_S} s after SIGTERM")
            process.kill()
        worst = max(worst, time.monotonic() - begin)
        # Before the first step there is nothing to save, and the signal ends the process.
        if process.returncode not in (0, PREEMPTED, -signal.SIGTERM):
            lost.append(f"{workdir.name}: ended with status {process.returncode}")
        return True

    stops, runs = _tortured(bench, scratch, times(scale, 15), stop, lost)
    return result("train_preempted", stops, lost, runs_compared=runs, longest_s=round(worst, 1))


def train_on_other_devices(scratch: pathlib.Path, scale: float) -> dict:
    """Trains an epoch each on 8, 4, 2 and 1 devices, then in two processes. Losses equal those of a run on one device.

    They are equal to rounding, 1e-4.
    """
    config = dataclasses.replace(small_config())
    # The number of epochs grows from run to run, so no field may depend on it.
    config.train = dataclasses.replace(config.train, schedule="constant", scheduled_sampling=0.0, cider_epochs=0)
    bench, lost = Workbench(scratch, config), []
    bench.finish(scratch / "undisturbed", "--config.train.epochs=5")
    for epochs, devices in enumerate((8, 4, 2, 1), 1):
        bench.finish(scratch / "run", f"--config.train.epochs={epochs}", devices=devices)
    for process in bench.pair(scratch / "run", "--config.train.epochs=5"):
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(out)
    ours, theirs = (
        [line["val/loss"] for line in lines(scratch / name) if "val/loss" in line] for name in ("run", "undisturbed")
    )
    if len(ours) != len(theirs):
        return result("train_on_other_devices", 5, [f"found {len(ours)} epochs, expected {len(theirs)}"])
    off = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    lost += [f"epoch {n}: validation loss off by {x:.1e}" for n, x in enumerate(off, 1) if x > 1e-4]
    return result("train_on_other_devices", 5, lost, largest_difference=max(off))


def pairs_preempted(scratch: pathlib.Path, scale: float) -> dict:
    """Sends SIGTERM to one of two processes. Both save the same step and exit with status 75."""
    bench, rng, lost = Workbench(scratch), random.Random(2), []
    tries, worst = times(scale, 5), 0.0
    for n in range(tries):
        pair = bench.pair(scratch / "run", "--config.train.epochs=100000", "--config.train.cider_epochs=0")
        until(pair[0], "epoch ")
        time.sleep(rng.uniform(0, 2))
        begin = time.monotonic()
        pair[rng.randrange(2)].send_signal(signal.SIGTERM)
        said = [ended(process, PREEMPTED_WITHIN_S) for process in pair]
        worst = max(worst, time.monotonic() - begin)
        steps = {out.rpartition("saved at step ")[2].split(" ")[0] for out in said}
        if [p.returncode for p in pair] != [PREEMPTED] * 2 or len(steps) != 1:
            lost.append(f"try {n}: statuses {[p.returncode for p in pair]}, steps {steps}")
    return result("pairs_preempted", tries, lost, longest_s=round(worst, 1))


def host_dies(scratch: pathlib.Path, scale: float) -> dict:
    """Kills one of two processes. The other one fails in bounded time, and both resume when started again."""
    bench, rng, lost = Workbench(scratch), random.Random(3), []
    tries, worst = times(scale, 5), 0.0
    for n in range(tries):
        pair = bench.pair(scratch / "run", "--config.train.epochs=100000", "--config.train.cider_epochs=0")
        until(pair[0], "epoch ")
        time.sleep(rng.uniform(0, 2))
        begin, victim = time.monotonic(), n % 2
        pair[victim].kill()
        out = ended(pair[1 - victim], DIES_WITHIN_S)
        pair[victim].communicate()
        worst = max(worst, time.monotonic() - begin)
        # The second text is JAX's, when the process that coordinates has died.
        explained = "same command" in out or "another task died" in out
        if pair[1 - victim].returncode in (0, PREEMPTED, -signal.SIGKILL) or not explained:
            lost.append(f"try {n}: status {pair[1 - victim].returncode}: {out[-2000:]}")
    return result("host_dies", tries, lost, longest_s=round(worst, 1))


def until(process: subprocess.Popen, text: str) -> None:
    """Reads the output until a line holds the text.

    Raises:
      RuntimeError: the output ended before.
    """
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise RuntimeError("".join(seen))


def ended(process: subprocess.Popen, within_s: float) -> str:
    """Returns the output of a process that has ended, or that is killed after `within_s`."""
    try:
        return process.communicate(timeout=within_s)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def same_seed(scratch: pathlib.Path, scale: float) -> dict:
    """Runs one command several times. The results are bit-equal."""
    bench, lost = Workbench(scratch), []
    runs = times(scale, 3)
    bench.finish(scratch / "undisturbed")
    for n in range(runs):
        bench.finish(scratch / f"run{n}")
        lost += differences(scratch / f"run{n}", scratch / "undisturbed", f"run {n}")
    return result("same_seed", runs, lost)


def not_finite(scratch: pathlib.Path, scale: float) -> dict:
    """Trains on features that are not finite. Their steps are skipped or end the run, and no parameter changes."""
    bench, rng, lost = Workbench(scratch), np.random.default_rng(4), []
    tries = times(scale, 5)
    split = Store(path_for(bench.data_dir, bench.config)).split("train")
    _, positions, width = split.shape
    array = split.create_array(positions, width, bench.config.encoder.store_dtype)
    sound = np.array(array.read().result())
    skipped = ended_runs = 0
    for n in range(tries):
        bad = sound.copy()
        rows = rng.choice(len(bad), int(rng.choice([1, 3, len(bad)])), replace=False)
        bad[rows, rng.integers(1, 64)] = rng.choice([np.inf, -np.inf, 3e38])
        array.write(bad).result()
        workdir = scratch / f"run{n}"
        process = bench.train(workdir, "--max_bad_steps=5")
        out, _ = process.communicate()
        skipped += out.count("is not finite")
        ended_runs += process.returncode == 1
        if process.returncode == 1 and not list(workdir.glob("bad_step_*.npz")):
            lost.append(f"try {n}: ended without the batch: {out[-200:]}")
        elif process.returncode not in (0, 1):
            lost.append(f"try {n}: status {process.returncode}: {out[-200:]}")
        elif list(workdir.glob("checkpoints/[0-9]*")) and not all_finite(newest(workdir)):
            lost.append(f"try {n}: a checkpoint that is not finite")
    return result("not_finite", tries, lost, steps_skipped=skipped, runs_ended=ended_runs)


def all_finite(arrays: dict[str, np.ndarray]) -> bool:
    return all(np.isfinite(x).all() for x in arrays.values() if x.dtype.kind == "f")


CASES = (
    train_killed,
    train_preempted,
    train_on_other_devices,
    pairs_preempted,
    host_dies,
    same_seed,
    not_finite,
)
