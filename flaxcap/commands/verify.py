"""`flaxcap verify`: whether the files of a store or a run are still what was written."""

import contextlib
import types
from collections.abc import Callable

import tqdm
from etils import epath

from flaxcap.commands import FAILED
from flaxcap.config import Config
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.features.shards import Split, StoreError
from flaxcap.files import integrity
from flaxcap.files.integrity import DamagedError, Sum
from flaxcap.training import checkpoints

ANEW = "`flaxcap prepare` makes it anew"
CUT_OFF = "`flaxcap train` writes it when it goes on"


class Report:
    """What was read, and what is wrong with it."""

    def __init__(self, tell: Callable[[int], object]):
        self.files, self.size = 0, 0  # that were compared with their checksums, and their bytes
        self.wrong: list[str] = []  # a line each: the file, what is wrong with it, and what to do about it
        self._tell = tell

    def add(self, path: epath.Path, found: Exception | str, mend: str) -> None:
        self.wrong.append(f"{path}: {found}; {mend}")

    def file(self, path: epath.Path, expected: Sum, mend: str) -> None:
        """Compares a file with its sum."""
        try:
            integrity.check(path, expected, self._count)
            self.files += 1
        except DamagedError as e:
            self.add(path, e, mend)

    def directory(self, path: epath.Path, mend: str) -> None:
        """Compares all files that it has sums of."""
        try:
            sums = integrity.read_sums(path)
        except DamagedError as e:
            self.add(path / integrity.SUMS, e, mend)
            return
        for name, expected in sums.items():
            self.file(path / name, expected, mend)
        self.files += 1

    def parsed(self, path: epath.Path, read: Callable[[epath.Path], object], mend: str) -> None:
        """Reads a file that tells itself whether it is whole."""
        try:
            read(path)
            self.files += 1
            self._count(path.stat().length)
        except FileNotFoundError:
            self.add(path, "missing", mend)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            self.add(path, str(e).removeprefix(f"{path}: "), mend)

    def shard(self, split: Split, role: str, number: int) -> None:
        """Compares a finished shard with its note; damaged, it becomes an unfinished one, where that can be written."""
        mend = f"shard {number} of {role}: {ANEW}"
        before = len(self.wrong)
        try:
            note = split.note(number)
            split.check_shard(number, self._count)
            self.files += 2 if note.file else 1
        except StoreError as e:
            self.add(split.note_file(number), str(e).removeprefix(f"{split.note_file(number)}: "), mend)
        except DamagedError as e:
            self.add(split.shard_file(number), e, mend)
        if len(self.wrong) > before:
            try:
                split.undo(number)
            except StoreError as e:
                self.wrong[-1] += f", once it can be written to ({e})"

    def _count(self, size: int) -> None:
        self.size += size
        self._tell(size)

    def lines(self) -> list[str]:
        """For the user; the last one sums up."""
        lines = list(self.wrong)
        end = f"{len(self.wrong)} to be mended" if self.wrong else "sound"
        return [*lines, f"{self.files} files, {self.size} bytes: {end}"]


def verify(*, workdir: epath.PathLike | None = None, store_dir: epath.PathLike | None = None) -> Report:
    """Reads every file of a run, of a store, or both.

    Damaged shards are made unfinished ones, so that `flaxcap prepare` makes them, and only them, anew. UserError if
    there is no run or no store.
    """
    places = [epath.Path(workdir) / "checkpoints"] if workdir is not None else []
    places += [epath.Path(store_dir)] if store_dir is not None else []
    total = sum(map(_size, places))
    with tqdm.tqdm(desc="verify", total=total, unit="B", unit_scale=True, disable=None) as bar:
        report = Report(bar.update)
        if workdir is not None:
            _run(epath.Path(workdir), report)
        if store_dir is not None:
            _store(epath.Path(store_dir), report)
    return report


def _size(directory: epath.Path) -> int:
    """The bytes of all files in it."""
    size = 0
    for name in integrity.names_below(directory):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on deletes some
            size += (directory / name).stat().length
    return size


def _run(workdir: epath.Path, report: Report) -> None:
    if not (workdir / "config.json").exists() and not (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: found neither config.json nor checkpoints, expected a run of flaxcap")
    mend = "delete both config.json and vocabulary.json; `flaxcap train` with the same preset writes them anew"
    report.directory(workdir, mend)
    mend = "`flaxcap train` sets this checkpoint aside, and goes on from the newest sound one"
    for step in checkpoints.steps(workdir / "checkpoints"):
        before = len(report.wrong)
        if (step / integrity.SUMS).exists():
            report.directory(step, mend)
        else:
            report.add(step / integrity.SUMS, "missing, its save is under way or was cut off", CUT_OFF)
        if not step.exists():  # a run that goes on has deleted it meanwhile
            del report.wrong[before:]


def _store(path: epath.Path, report: Report) -> None:
    if not (path / store.MANIFEST).exists() and not (path / store.COPY).exists():
        _ = store.Store(path)  # says what to do
    mend = "`flaxcap prepare` restores it from its copy"
    report.parsed(path / store.MANIFEST, store.read_manifest, mend)
    try:
        found = store.Store(path)
    except StoreError:
        found = store.Store(path, store.COPY)
    report.parsed(path / store.COPY, store.read_manifest, mend)
    for name, expected in found.sums.items():
        report.file(path / name, expected, ANEW)
    if "imported_from" not in found.manifest["encoder"]:
        report.directory(path / store.ENCODER_DIR, ANEW)
    for role in found.roles:
        split = found.split(role)
        left = split.unfinished()
        if left:
            report.add(split.path, f"shards {', '.join(map(str, left))} are not finished", "`flaxcap prepare` goes on")
        for number in split.finished():
            report.shard(split, role, number)


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap verify` and returns its exit status."""
    if not flags.workdir and not flags.config:
        raise UserError(
            "nothing to verify is named: give --workdir=RUN, or --config and --data_dir of a store, or both"
        )
    store_dir = store.path_for(flags.data_dir, config) if flags.config else None
    report = verify(workdir=flags.workdir or None, store_dir=store_dir)
    for line in report.lines():
        print(line)
    return FAILED if report.wrong else 0
