"""Cases of disks that are full, read-only or frozen, under `prepare`, `train` and `export`.

They mount small file systems, which takes root. Without root they try nothing and say so.
"""

import contextlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from torture_cases.workbench import Workbench, differences, result, times

from flaxcap.commands.verify import verify
from flaxcap.features.store import path_for
from flaxcap.files.params import load_params
from flaxcap.inference import loading
from flaxcap.training import checkpoints

LEFTOVERS = ("*.part", "*.__lock", "*.orbax-checkpoint-tmp*", "incomplete.*", "*.unfinished")
SIZE = 64 << 20  # bytes of a small file system


def program(*args: str) -> subprocess.Popen:
    """Starts a command of flaxcap that takes no preset."""
    line = [sys.executable, "-m", "flaxcap", *args]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(process: subprocess.Popen) -> tuple[int, str]:
    """Waits for a process. Returns its status and its output."""
    out, _ = process.communicate()
    return process.returncode, out


def store_of(bench: Workbench, data_dir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(path_for(data_dir, bench.config))


def other_store(bench: Workbench, data_dir: pathlib.Path, label: str) -> list[str]:
    """Returns what is not bit-equal to an undisturbed store, and files left in the data directory."""
    ours, theirs = (store_of(bench, d) for d in (data_dir, bench.data_dir))
    # Orbax's files hold the time and random names, so of the encoder the parameters are compared.
    found, expected = (
        {str(f.relative_to(d)): f.read_bytes() for f in d.rglob("*") if f.is_file() and "encoder" not in f.parts}
        for d in (ours, theirs)
    )
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    lost = [f"{label}: {len(wrong)} files differ, {wrong[0]} first"] if wrong else []
    encoders = (load_params(d / "encoder") for d in (ours, theirs))
    if not jax.tree.all(jax.tree.map(np.array_equal, *encoders)):
        lost.append(f"{label}: another encoder")
    return lost + [f"{label}: left behind: {left}" for pattern in LEFTOVERS for left in data_dir.rglob(pattern)]


def command(*args: object) -> bool:
    """Runs a command of the system. Returns true if it exists and succeeds."""
    line = list(map(str, args))
    return bool(shutil.which(line[0])) and not subprocess.run(line, capture_output=True).returncode


@contextlib.contextmanager
def small_disk(path: pathlib.Path) -> Iterator[bool]:
    """Mounts a tmpfs of `SIZE` bytes at `path`. Yields false if none can be mounted."""
    path.mkdir()
    mounted = os.geteuid() == 0 and command("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", path)
    try:
        yield mounted
    finally:
        if mounted:
            command("umount", "--lazy", path)


@contextlib.contextmanager
def real_disk(scratch: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """Mounts an ext4 file system, which can be frozen. Yields its path, or None if none can be mounted."""
    image, path = scratch / "disk.img", scratch / "disk"
    path.mkdir()
    with image.open("wb") as f:
        f.truncate(256 << 20)
    mounted = os.geteuid() == 0 and command("mkfs.ext4", "-q", image) and command("mount", "-o", "loop", image, path)
    try:
        yield path if mounted else None
    finally:
        if mounted:
            command("fsfreeze", "-u", path)
            command("umount", path)


def not_tried(name: str) -> dict:
    return result(name, 0, []) | {"not_tried": "no file system can be mounted without root"}


def fill(disk: pathlib.Path, left: int) -> pathlib.Path:
    """Writes a file that leaves `left` bytes free, and returns its path."""
    ballast = disk / "ballast"
    with ballast.open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, shutil.disk_usage(disk).free - left))
    return ballast


def badly_reported(status: int, out: str, name: str, path: pathlib.Path) -> list[str]:
    """Returns nothing if a command ended with a line that names the path, and else the mistake.

    Args:
      status: exit status, expected to be 1.
      out: all output.
      name: of the command.
      path: of the disk.
    """
    last = out.strip().splitlines()[-1] if out.strip() else ""
    if status != 1 or not last.startswith(f"flaxcap {name}: ") or str(path) not in last:
        return [f"status {status}: {out[-400:]}"]
    return ["a traceback"] if "Traceback" in out else []


Start = Callable[[pathlib.Path], subprocess.Popen]


def _full(name: str, scratch: pathlib.Path, tries: int, need: int, start: Start, after: Callable) -> tuple[list, int]:
    """Runs a command on disks with too little space, then with all their space.

    Args:
      name: of the command.
      scratch: where the disks are mounted.
      tries: number of disks.
      need: at most so many bytes are free at first.
      start: `start(disk)` starts the command.
      after: `after(disk, label, done)` returns mistakes, after the failure and after the success.

    Returns:
      All mistakes, and the number of disks that were too full.
    """
    rng, lost, full = random.Random(14), [], 0
    for n in range(tries):
        with small_disk(scratch / f"disk{n}"):
            disk, left = scratch / f"disk{n}", rng.choice([0, 4096, rng.randrange(need), rng.randrange(need)])
            ballast, label = fill(disk, left), f"try {n}, {left} bytes free"
            status, out = run(start(disk))
            ballast.unlink()
            if status:
                full += 1
                lost += [f"{label}: {mistake}" for mistake in badly_reported(status, out, name, disk)]
                lost += after(disk, label, False)
                status, out = run(start(disk))
            lost += after(disk, label, True) if status == 0 else [f"{label}: with space again: {out[-400:]}"]
    return lost, full


def full_under_prepare(scratch: pathlib.Path, scale: float) -> dict:
    """Fills the disk at any point of `prepare`. A line says so. With space again the same command ends bit-equal."""
    bench, tries = Workbench(scratch), times(scale, 6)
    with small_disk(scratch / "probe") as mounted:
        if not mounted:
            return not_tried("full_under_prepare")
    need = sum(f.stat().st_size for f in bench.data_dir.rglob("*") if f.is_file())

    def after(disk: pathlib.Path, label: str, done: bool) -> list[str]:
        return other_store(bench, disk / "data", label) if done else []

    lost, full = _full(
        "prepare", scratch, tries, need, lambda d: bench.start("prepare", f"--data_dir={d / 'data'}"), after
    )
    return result("full_under_prepare", tries, lost, was_full=full)


def full_under_train(scratch: pathlib.Path, scale: float) -> dict:
    """Fills the disk at any point of a run. A line says so, and the last checkpoint is intact and can caption.

    With space again the same command ends bit-equal.
    """
    bench, tries = Workbench(scratch), times(scale, 6)
    with small_disk(scratch / "probe") as mounted:
        if not mounted:
            return not_tried("full_under_train")
    bench.finish(scratch / "undisturbed")
    need = 3 * sum(f.stat().st_size for f in (scratch / "undisturbed").rglob("*") if f.is_file())
    restored = 0

    def after(disk: pathlib.Path, label: str, done: bool) -> list[str]:
        nonlocal restored
        if done:
            return differences(disk / "run", scratch / "undisturbed", label)
        if not checkpoints.steps(disk / "run" / "checkpoints"):
            return []
        restored += 1
        loading.load_run(disk / "run", bench.data_dir)
        return [f"{label}: {line}" for line in verify(workdir=disk / "run").wrong if "/checkpoints/" in line]

    lost, full = _full("train", scratch, tries, need, lambda d: bench.train(d / "run"), after)
    return result("full_under_train", tries, lost, was_full=full, restored_meanwhile=restored)


def full_under_export(scratch: pathlib.Path, scale: float) -> dict:
    """Fills the disk at any point of an export. A line says so, and no half-written export can be loaded.

    With space again the same command finishes.
    """
    bench, tries = Workbench(scratch), times(scale, 3)
    with small_disk(scratch / "probe") as mounted:
        if not mounted:
            return not_tried("full_under_export")
    bench.finish(scratch / "run", "--config.train.epochs=1", "--config.train.cider_epochs=0")
    workdir = f"--workdir={scratch / 'run'}"

    def after(disk: pathlib.Path, label: str, done: bool) -> list[str]:
        if (disk / "model" / "config.json").exists():
            loading.load_export(disk / "model")
            return []
        return [f"{label}: there is no export"] if done else []

    def start(disk: pathlib.Path) -> subprocess.Popen:
        return program("export", workdir, f"--data_dir={bench.data_dir}", f"--out={disk / 'model'}")

    lost, full = _full("export", scratch, tries, 4 << 20, start, after)
    return result("full_under_export", tries, lost, was_full=full)


def read_only(scratch: pathlib.Path, scale: float) -> dict:
    """Runs `prepare`, `train` and `export` on a read-only disk. A line says so. `evaluate` and `verify` succeed."""
    bench, lost = Workbench(scratch), []
    with small_disk(scratch / "disk") as mounted:
        if not mounted:
            return not_tried("read_only")
        disk = scratch / "disk"
        bench.finish(scratch / "undisturbed")
        run(bench.train(disk / "run", "--config.train.epochs=2", "--config.train.cider_epochs=0"))
        shutil.copytree(bench.data_dir, disk / "data")
        command("mount", "-o", "remount,ro", disk)
        data = f"--data_dir={disk / 'data'}"
        for name, start in {
            "prepare": lambda: bench.start("prepare", data),
            "train": lambda: bench.train(disk / "run", data),
            "export": lambda: program("export", f"--workdir={disk / 'run'}", data, f"--out={disk / 'model'}"),
        }.items():
            lost += [f"{name}: {mistake}" for mistake in badly_reported(*run(start()), name, disk)]
        for name in ("evaluate", "verify"):
            more = [f"--out_dir={scratch / 'scores'}"] if name == "evaluate" else []
            status, out = run(program(name, f"--workdir={disk / 'run'}", data, *more))
            lost += [f"{name}: {out[-400:]}"] if status else []
    return result("read_only", 5, lost)


def stands_still(scratch: pathlib.Path, scale: float) -> dict:
    """Freezes the disk for seconds, repeatedly, under `prepare` and `train`. Both end as on a disk that answers."""
    bench, lost, tries = Workbench(scratch), [], times(scale, 2)
    bench.finish(scratch / "undisturbed")
    with real_disk(scratch) as disk:
        if disk is None or not (command("fsfreeze", "-f", disk) and command("fsfreeze", "-u", disk)):
            return not_tried("stands_still")
        stopped = 0
        for n in range(tries):
            rng, over = random.Random(n), threading.Event()

            def freeze(rng: random.Random = rng, over: threading.Event = over) -> None:
                nonlocal stopped
                while not over.wait(rng.uniform(0.2, 1.5)):
                    stopped += command("fsfreeze", "-f", disk)
                    time.sleep(rng.uniform(0.5, 3))
                    command("fsfreeze", "-u", disk)

            thread = threading.Thread(target=freeze)
            thread.start()
            ends = [run(bench.start("prepare", f"--data_dir={disk / 'data'}")), run(bench.train(disk / "run"))]
            over.set()
            thread.join()
            lost += [f"try {n}: {out[-300:]}" for status, out in ends if status]
            if not any(status for status, _ in ends):
                lost += other_store(bench, disk / "data", f"try {n}")
                lost += differences(disk / "run", scratch / "undisturbed", f"try {n}")
            for name in ("data", "run"):
                shutil.rmtree(disk / name)
    return result("stands_still", 2 * tries, lost, stood_still=stopped)


CASES = (full_under_prepare, full_under_train, full_under_export, read_only, stands_still)
