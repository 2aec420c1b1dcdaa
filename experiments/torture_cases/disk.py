"""What is on disk, under torture: prepare killed, bytes changed, two at once; no space, no permission, no answer."""

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
MOST = 8  # kills of one prepare


def half_written(data_dir: pathlib.Path, whole: pathlib.Path, bench: Workbench, label: str) -> list[str]:
    """What a prepare that was killed shows as whole, and is not."""
    ours = store_of(bench, data_dir)
    try:
        Store.finished(data_dir, bench.config)
        finished = True
    except StoreError:
        finished = False
    if not (ours / "manifest.json").exists():
        return []
    found, expected, lost = Store(ours), Store(store_of(bench, whole)), []
    for role in found.roles:
        split, theirs = found.split(role), expected.split(role)
        if split.rows != theirs.rows:
            lost.append(f"{label}: other captions of {role}")
        if finished and split.unfinished():
            lost.append(f"{label}: taken for finished")
        for number in split.finished():
            rows = split.shard(number)
            if split.read(rows).tobytes() != theirs.read(rows).tobytes():
                lost.append(f"{label}: shard {number} of {role} is not whole")
    report = verify(store_dir=ours)
    return lost + [f"{label}: {line}" for line in report.wrong if "are not finished" not in line]


def count(data_dir: pathlib.Path, patterns: tuple[str, ...] = ("*",)) -> int:
    with contextlib.suppress(FileNotFoundError):  # what is looked at comes and goes
        return sum(path.is_file() for pattern in patterns for path in data_dir.rglob(pattern))
    return 0


def prepare_killed(scratch: pathlib.Path, scale: float) -> dict:
    """SIGKILL at random times, every second one inside a write; nothing half-written is read; at the end bit-equal."""
    bench, rng, lost = Workbench(scratch), random.Random(10), []
    files = count(bench.data_dir)
    kills = writes = number = 0
    while kills < times(scale, 25):
        data_dir = scratch / f"data{number}"
        for n in range(MOST + 1):
            until = rng.randint(have := count(data_dir), max(have, files))  # so many are there when it is killed
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


# Changed bytes


def read_store(path: pathlib.Path) -> None:
    found = Store(path)
    found.vocabulary()
    load_params(path / "encoder")
    for role in found.roles:
        split: Split = found.split(role)
        _ = split.rows
        split.read(split.present())


def flipped(
    directory: pathlib.Path, rng: random.Random, places: int, look: Callable[[pathlib.Path], list[str]]
) -> tuple[int, list[str]]:
    """Changes a bit at several places of every file, one at a time; how many, and what `look` found wrong."""
    tried, lost = 0, []
    for file in sorted(f for f in directory.rglob("*") if f.is_file() and f.name != ".lock" and f.stat().st_size):
        whole = file.read_bytes()
        for _ in range(places):
            data, place = bytearray(whole), rng.randrange(len(whole))
            data[place] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            tried += 1
            lost += [f"{file.relative_to(directory)}, byte {place}: {what}" for what in look(file)]
            file.write_bytes(whole)
    return tried, lost


def bytes_of_a_store(scratch: pathlib.Path, scale: float) -> dict:
    """A bit changed anywhere in any file: verify names the file, and so does what reads it."""
    bench = Workbench(scratch)
    path, rng = store_of(bench, bench.data_dir), random.Random(11)
    notes = {note: note.read_bytes() for note in path.glob("*/shards/*.json")}

    def look(file: pathlib.Path) -> list[str]:
        wrong = verify(store_dir=path).wrong
        for note, data in notes.items():  # those of damaged shards are gone
            if note != file:
                note.write_bytes(data)
        if file in notes and not file.exists():
            file.write_bytes(notes[file][:-1])  # to be read below as a damaged one
        found = [] if len(wrong) == 1 and wrong[0].startswith(f"{file}: ") else [f"verify says {wrong}"]
        if file.name != COPY:
            found += unseen(lambda: read_store(path), file)
        return found

    tried, lost = flipped(path, rng, times(scale, 3), look)
    read_store(path)
    return result("bytes_of_a_store", tried, lost, files=len(list(path.rglob("*"))))


def unseen(read: Callable[[], object], file: pathlib.Path) -> list[str]:
    """What is wrong with how damage is met."""
    try:
        read()
        return ["it was read"]
    except UserError as e:
        return [] if str(file) in str(e) else [f"the reader says {e}"]
    except Exception as e:
        return [f"{type(e).__name__}: {e}"]


def bytes_of_a_run(scratch: pathlib.Path, scale: float) -> dict:
    """The same of checkpoints; and train, given damaged ones, goes on from a sound one and ends bit-equal."""
    bench, rng = Workbench(scratch), random.Random(12)
    workdir, whole = scratch / "run", scratch / "whole"
    bench.finish(whole, "--config.train.keep_latest=2")
    shutil.copytree(whole, workdir)
    folder = workdir / "checkpoints"
    opened = Checkpoints(folder)
    newest, best = (folder / str(step) for step in (opened.latest_step, opened.best_step))
    opened.close()

    def look(file: pathlib.Path) -> list[str]:
        wrong = verify(workdir=workdir).wrong
        found = [] if len(wrong) == 1 and wrong[0].startswith(f"{file}: ") else [f"verify says {wrong}"]
        if best in file.parents or not {"params", "rest", "progress"} & set(file.parts):
            found += unseen(lambda: loading.load_run(workdir, bench.data_dir), file)
        return found

    tried, lost = flipped(folder, rng, times(scale, 2), look)
    for n in range(times(scale, 2)):
        file = rng.choice(sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size))
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1
        file.write_bytes(data)
        status, out = run(bench.train(workdir, "--config.train.keep_latest=2"))
        tried += 1
        if status or "is set aside" not in out:
            lost.append(f"goes on, try {n}: status {status}: {out[-300:]}")
        else:
            lost += differences(workdir, whole, f"goes on, try {n}")
    return result("bytes_of_a_run", tried, lost)


def prepare_mends(scratch: pathlib.Path, scale: float) -> dict:
    """Random files of a store damaged or deleted: verify, then prepare, and it is bit-equal again."""
    bench, rng, lost = Workbench(scratch), random.Random(13), []
    tries, data_dir = times(scale, 5), scratch / "mended"
    shutil.copytree(bench.data_dir, data_dir)
    path = store_of(bench, data_dir)
    for n in range(tries):
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size and f.name != ".lock")
        for file in rng.sample([f for f in files if f.name != COPY], rng.choice([1, 2, len(files) // 2])):
            how = rng.randrange(3)
            if how == 0:
                file.unlink()
                continue
            data = bytearray(file.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data if how == 1 else data[: rng.randrange(len(data))])
        verify(store_dir=path)
        status, out = run(bench.start("prepare", f"--data_dir={data_dir}"))
        lost += other_store(bench, data_dir, f"try {n}") if status == 0 else [f"try {n}: {out[-300:]}"]
        if verify(store_dir=path).wrong:
            lost.append(f"try {n}: verify is not content")
    return result("prepare_mends", tries, lost)


# Two at once


def two_at_once(scratch: pathlib.Path, scale: float) -> dict:
    """A second run in a workdir and a second prepare of a store are refused, and say who is there; a dead one holds
    nothing; two stores of one data set are prepared side by side.
    """
    bench, lost, tries = Workbench(scratch), [], times(scale, 2)
    bench.finish(scratch / "whole")
    longest = 0.0
    for n in range(tries):
        workdir, data_dir = scratch / f"run{n}", scratch / f"data{n}"
        for start, place in (
            (lambda w=workdir: bench.train(w), workdir),
            (lambda d=data_dir: bench.start("prepare", f"--data_dir={d}"), store_of(bench, data_dir)),
        ):
            first = start()
            held(place / ".lock", first)
            begin = time.monotonic()
            status, out = run(start())
            longest = max(longest, time.monotonic() - begin)
            if status != 1 or f"{place}: in use by process {first.pid} on " not in out:
                lost.append(f"try {n}: the second ended with {status}: {out[-300:]}")
            if n % 2:
                first.kill()
            run(first)
            status, out = run(start())
            if status:
                lost.append(f"try {n}: the third ended with {status}: {out[-300:]}")
        lost += differences(workdir, scratch / "whole", f"try {n}") + other_store(bench, data_dir, f"try {n}")
        together, other = scratch / f"together{n}", "--config.encoder.block=mixed1"
        pair = [bench.start("prepare", f"--data_dir={together}", *more) for more in ((), (other,))]
        ends = [run(process) for process in pair]
        lost += [f"try {n}: side by side: {out[-300:]}" for status, out in ends if status]
    return result("two_at_once", 3 * tries, lost, refused_within_s=round(longest, 1))


def held(lock: pathlib.Path, process: subprocess.Popen) -> None:
    """Waits until the process holds the lock."""
    while not (lock.exists() and f"process {process.pid} " in lock.read_text()):
        if process.poll() is not None:
            raise RuntimeError(run(process)[1])
        time.sleep(0.01)


CASES = (
    prepare_killed,
    bytes_of_a_store,
    bytes_of_a_run,
    prepare_mends,
    two_at_once,
    *torture_space.CASES,
)
