"""Cases of files on disk: `prepare` killed, bits changed, two programs at once.

space.py has the cases of full and frozen disks.
"""

import contextlib
import pathlib
import random
import shutil
import subprocess
import time
from collections.abc import Callable

from torture_cases import space as torture_space
from torture_cases.space import other_store, run, store_of
from torture_cases.workbench import Workbench, differences, result, times

from flaxcap.commands.verify import verify
from flaxcap.errors import UserError
from flaxcap.features.shards import Split, StoreError
from flaxcap.features.store import COPY, Store
from flaxcap.files.params import load_params
from flaxcap.inference import loading
from flaxcap.training.checkpoints import Checkpoints

IN_A_WRITE = ("*.part", "*.__lock", "*.orbax-checkpoint-tmp*/**/*", "incomplete.*/**/*")
MOST = 8  # kills of one `prepare`


def half_written(data_dir: pathlib.Path, undisturbed: pathlib.Path, bench: Workbench, label: str) -> list[str]:
    """Returns what a killed `prepare` presents as complete although it is not, as lines that begin with `label`."""
    ours = store_of(bench, data_dir)
    try:
        Store.finished(data_dir, bench.config)
        finished = True
    except StoreError:
        finished = False
    if not (ours / "manifest.json").exists():
        return []
    found, expected, lost = Store(ours), Store(store_of(bench, undisturbed)), []
    for role in found.roles:
        split, theirs = found.split(role), expected.split(role)
        if split.rows != theirs.rows:
            lost.append(f"{label}: other captions of {role}")
        if finished and split.unfinished():
            lost.append(f"{label}: unfinished, but accepted as finished")
        for number in split.finished():
            rows = split.shard(number)
            if split.read(rows).tobytes() != theirs.read(rows).tobytes():
                lost.append(f"{label}: shard {number} of {role} is incomplete")
    report = verify(store_dir=ours)
    return lost + [f"{label}: {line}" for line in report.wrong if "are not finished" not in line]


def count(data_dir: pathlib.Path, patterns: tuple[str, ...] = ("*",)) -> int:
    """Counts the files that match the patterns."""
    with contextlib.suppress(FileNotFoundError):  # a running `prepare` renames and deletes files
        return sum(path.is_file() for pattern in patterns for path in data_dir.rglob(pattern))
    return 0


def prepare_killed(scratch: pathlib.Path, scale: float) -> dict:
    """Kills `prepare` at random moments, every second time inside a write. Nothing half-written is read.

    The finished store is bit-equal to an undisturbed one.
    """
    bench, rng, lost = Workbench(scratch), random.Random(10), []
    files = count(bench.data_dir)
    kills = writes = number = 0
    while kills < times(scale, 25):
        data_dir = scratch / f"data{number}"
        for n in range(MOST + 1):
            until = rng.randint(have := count(data_dir), max(have, files))  # number of files at the kill
            process = bench.start("prepare", f"--data_dir={data_dir}")
            while n < MOST and process.poll() is None:
                if n % 2 == 0 and count(data_dir) >= until:
                    time.sleep(rng.uniform(0, 0.3))
                    break
                if n % 2 and rng.random() < 0.1 and count(data_dir, IN_A_WRITE):
                    writes += 1
                    break
                time.sleep(0.002)
            if n < MOST:
                process.kill()
            status, out = run(process)
            if status == 0:
                break
            if n == MOST:
                raise RuntimeError(out)
            kills += 1
            lost += half_written(data_dir, bench.data_dir, bench, f"prepare {number}, kill {n}")
        lost += other_store(bench, data_dir, f"prepare {number}")
        number += 1
    return result("prepare_killed", kills, lost, stores_compared=number, inside_a_write=writes)


def read_store(path: pathlib.Path) -> None:
    """Reads every file of a store that the programs read."""
    found = Store(path)
    found.vocabulary()
    load_params(path / "encoder")
    for role in found.roles:
        split: Split = found.split(role)
        _ = split.rows
        split.read(split.present())


def flipped(
    directory: pathlib.Path, rng: random.Random, count: int, check: Callable[[pathlib.Path], list[str]]
) -> tuple[int, list[str]]:
    """Changes single bits of every file, one at a time.

    Args:
      directory: holds the files.
      rng: draws the bits.
      count: changes of each file.
      check: returns the mistakes in how a file's damage is met.

    Returns:
      The number of changes, and all mistakes.
    """
    tried, lost = 0, []
    for file in sorted(f for f in directory.rglob("*") if f.is_file() and f.name != ".lock" and f.stat().st_size):
        original = file.read_bytes()
        for _ in range(count):
            data, byte = bytearray(original), rng.randrange(len(original))
            data[byte] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            tried += 1
            lost += [f"{file.relative_to(directory)}, byte {byte}: {mistake}" for mistake in check(file)]
            file.write_bytes(original)
    return tried, lost


def bytes_of_a_store(scratch: pathlib.Path, scale: float) -> dict:
    """Changes a bit anywhere in any file of a store. `verify` names the file, and so does the program that reads it."""
    bench = Workbench(scratch)
    path, rng = store_of(bench, bench.data_dir), random.Random(11)
    notes = {note: note.read_bytes() for note in path.glob("*/shards/*.json")}

    def check(file: pathlib.Path) -> list[str]:
        wrong = verify(store_dir=path).wrong
        for note, data in notes.items():  # `verify` deletes the notes of damaged shards
            if note != file:
                note.write_bytes(data)
        if file in notes and not file.exists():
            file.write_bytes(notes[file][:-1])  # `read_store` meets a damaged note
        found = [] if len(wrong) == 1 and wrong[0].startswith(f"{file}: ") else [f"verify says {wrong}"]
        if file.name != COPY:
            found += undetected(lambda: read_store(path), file)
        return found

    tried, lost = flipped(path, rng, times(scale, 3), check)
    read_store(path)
    return result("bytes_of_a_store", tried, lost, files=len(list(path.rglob("*"))))


def undetected(read: Callable[[], object], file: pathlib.Path) -> list[str]:
    """Returns nothing if reading raises a UserError that names the damaged file, and else the mistake."""
    try:
        read()
        return ["it was read"]
    except UserError as e:
        return [] if str(file) in str(e) else [f"the reader says {e}"]
    except Exception as e:
        return [f"{type(e).__name__}: {e}"]


def bytes_of_a_run(scratch: pathlib.Path, scale: float) -> dict:
    """Changes a bit anywhere in a checkpoint. `verify` and the reader name the file.

    `train` then resumes from an undamaged checkpoint and ends bit-equal.
    """
    bench, rng = Workbench(scratch), random.Random(12)
    workdir, undisturbed = scratch / "run", scratch / "undisturbed"
    bench.finish(undisturbed, "--config.train.keep_latest=2")
    shutil.copytree(undisturbed, workdir)
    folder = workdir / "checkpoints"
    opened = Checkpoints(folder)
    newest, best = (folder / str(step) for step in (opened.latest_step, opened.best_step))
    opened.close()

    def check(file: pathlib.Path) -> list[str]:
        wrong = verify(workdir=workdir).wrong
        found = [] if len(wrong) == 1 and wrong[0].startswith(f"{file}: ") else [f"verify says {wrong}"]
        if best in file.parents or not {"params", "rest", "progress"} & set(file.parts):
            found += undetected(lambda: loading.load_run(workdir, bench.data_dir), file)
        return found

    tried, lost = flipped(folder, rng, times(scale, 2), check)
    for n in range(times(scale, 2)):
        file = rng.choice(sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size))
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1
        file.write_bytes(data)
        status, out = run(bench.train(workdir, "--config.train.keep_latest=2"))
        tried += 1
        if status or "is set aside" not in out:
            lost.append(f"resumes, try {n}: status {status}: {out[-300:]}")
        else:
            lost += differences(workdir, undisturbed, f"resumes, try {n}")
    return result("bytes_of_a_run", tried, lost)


def prepare_repairs(scratch: pathlib.Path, scale: float) -> dict:
    """Damages or deletes random files of a store. `verify`, then `prepare`, make it bit-equal again."""
    bench, rng, lost = Workbench(scratch), random.Random(13), []
    tries, data_dir = times(scale, 5), scratch / "repaired"
    shutil.copytree(bench.data_dir, data_dir)
    path = store_of(bench, data_dir)
    for n in range(tries):
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size and f.name != ".lock")
        for file in rng.sample([f for f in files if f.name != COPY], rng.choice([1, 2, len(files) // 2])):
            damage = rng.randrange(3)  # deleted, a changed bit, or cut off
            if damage == 0:
                file.unlink()
                continue
            data = bytearray(file.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data if damage == 1 else data[: rng.randrange(len(data))])
        verify(store_dir=path)
        status, out = run(bench.start("prepare", f"--data_dir={data_dir}"))
        lost += other_store(bench, data_dir, f"try {n}") if status == 0 else [f"try {n}: {out[-300:]}"]
        if verify(store_dir=path).wrong:
            lost.append(f"try {n}: verify still finds damage")
    return result("prepare_repairs", tries, lost)


def two_at_once(scratch: pathlib.Path, scale: float) -> dict:
    """Refuses a second run in a workdir and a second `prepare` of a store, and names the first process.

    A process that has died holds no lock. Two stores of one data set can be prepared at the same time.
    """
    bench, lost, tries = Workbench(scratch), [], times(scale, 2)
    bench.finish(scratch / "undisturbed")
    longest = 0.0
    for n in range(tries):
        workdir, data_dir = scratch / f"run{n}", scratch / f"data{n}"
        for start, directory in (
            (lambda w=workdir: bench.train(w), workdir),
            (lambda d=data_dir: bench.start("prepare", f"--data_dir={d}"), store_of(bench, data_dir)),
        ):
            first = start()
            held(directory / ".lock", first)
            begin = time.monotonic()
            status, out = run(start())
            longest = max(longest, time.monotonic() - begin)
            if status != 1 or f"{directory}: in use by process {first.pid} on " not in out:
                lost.append(f"try {n}: the second ended with {status}: {out[-300:]}")
            if n % 2:
                first.kill()
            run(first)
            status, out = run(start())
            if status:
                lost.append(f"try {n}: the third ended with {status}: {out[-300:]}")
        lost += differences(workdir, scratch / "undisturbed", f"try {n}") + other_store(bench, data_dir, f"try {n}")
        together, other = scratch / f"together{n}", "--config.encoder.block=mixed1"
        pair = [bench.start("prepare", f"--data_dir={together}", *more) for more in ((), (other,))]
        ends = [run(process) for process in pair]
        lost += [f"try {n}: side by side: {out[-300:]}" for status, out in ends if status]
    return result("two_at_once", 3 * tries, lost, refused_within_s=round(longest, 1))


def held(lock: pathlib.Path, process: subprocess.Popen) -> None:
    """Waits until the process holds the lock.

    Raises:
      RuntimeError: the process ended before.
    """
    while not (lock.exists() and f"process {process.pid} " in lock.read_text()):
        if process.poll() is not None:
            raise RuntimeError(run(process)[1])
        time.sleep(0.01)


CASES = (
    prepare_killed,
    bytes_of_a_store,
    bytes_of_a_run,
    prepare_repairs,
    two_at_once,
    *torture_space.CASES,
)
