"""`flaxcap verify`: compares the files of a store or a run with their checksums."""

import contextlib
import types

import tqdm
from etils import epath

from flaxcap.commands import FAILED
from flaxcap.config import Config
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.features.shards import Split, StoreError
from flaxcap.files import integrity
from flaxcap.files.integrity import Checksum, DamagedError, Progress
from flaxcap.training import checkpoints

_WRITE_AGAIN = "`flaxcap prepare` writes it again"


class VerifyReport:
    """The damage that was found in files.

    Attributes:
      files: the number of files that are sound.
      size: bytes read.
      wrong: one line for each problem: the file, what was found, and a remedy.
    """

    def __init__(self, progress: Progress):
        self.files, self.size = 0, 0
        self.wrong: list[str] = []
        self._progress = progress

    def add(self, path: epath.Path, found: Exception | str, remedy: str) -> None:
        self.wrong.append(f"{path}: {found}; {remedy}")

    def check_file(self, path: epath.Path, expected: Checksum, remedy: str) -> None:
        """Compares a file with its checksum."""
        try:
            integrity.check(path, expected, self._count)
            self.files += 1
        except DamagedError as e:
            self.add(path, e, remedy)

    def check_directory(self, path: epath.Path, remedy: str) -> None:
        """Compares the files of a directory with the checksums in its file CHECKSUMS."""
        try:
            checksums = integrity.read_checksums(path)
        except DamagedError as e:
            self.add(path / integrity.CHECKSUMS, e, remedy)
            return
        for name, expected in checksums.items():
            self.check_file(path / name, expected, remedy)
        self.files += 1

    def check_manifest(self, path: epath.Path) -> None:
        """Compares a manifest, or its copy, with the checksum at its end."""
        remedy = "`flaxcap prepare` restores it from its copy"
        try:
            store.read_manifest(path)
            self.files += 1
            self._count(path.stat().length)
        except FileNotFoundError:
            self.add(path, "missing", remedy)
        except (OSError, ValueError, RecursionError) as e:
            self.add(path, e, remedy)

    def check_shard(self, split: Split, role: str, number: int) -> None:
        """Compares a complete shard with its record. A damaged shard becomes unfinished if the disk can be written."""
        remedy = f"shard {number} of {role}: `flaxcap prepare` computes it again"
        try:
            split.check_shard(number, self._count)
            self.files += 2 if split.record(number).file else 1
            return
        except StoreError as e:
            self.add(split.record_file(number), str(e).removeprefix(f"{split.record_file(number)}: "), remedy)
        except DamagedError as e:
            self.add(split.shard_file(number), e, remedy)
        try:
            split.mark_unfinished(number)
        except StoreError as e:
            self.wrong[-1] += f", once the disk can be written ({e})"

    def _count(self, size: int) -> None:
        self.size += size
        self._progress(size)

    def lines(self) -> list[str]:
        """Returns the lines to print; the last one is a summary."""
        end = f"{len(self.wrong)} damaged" if self.wrong else "sound"
        return [*self.wrong, f"{self.files} files, {self.size} bytes: {end}"]


def verify(*, workdir: epath.PathLike | None = None, store_dir: epath.PathLike | None = None) -> VerifyReport:
    """Reads every file of a run, of a store, or of both.

    A damaged shard becomes unfinished, so that `flaxcap prepare` computes it again, and no other.

    Raises:
      UserError: there is no run, or no store.
    """
    directories = [epath.Path(workdir) / "checkpoints"] if workdir is not None else []
    directories += [epath.Path(store_dir)] if store_dir is not None else []
    total = sum(map(_size, directories))
    with tqdm.tqdm(desc="verify", total=total, unit="B", unit_scale=True, disable=None) as bar:
        report = VerifyReport(bar.update)
        if workdir is not None:
            _verify_run(epath.Path(workdir), report)
        if store_dir is not None:
            _verify_store(epath.Path(store_dir), report)
    return report


def _size(directory: epath.Path) -> int:
    """Returns the bytes of all files in a directory."""
    size = 0
    for name in integrity.names_below(directory):
        with contextlib.suppress(FileNotFoundError):  # a running train deletes checkpoints
            size += (directory / name).stat().length
    return size


def _verify_run(workdir: epath.Path, report: VerifyReport) -> None:
    if not (workdir / "config.json").exists() and not (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: found neither config.json nor checkpoints, expected a run of flaxcap")
    report.check_directory(
        workdir,
        "delete config.json, vocabulary.json and data.json; `flaxcap train` with the same preset writes them again",
    )
    for step in checkpoints.steps(workdir / "checkpoints"):
        before = len(report.wrong)
        if (step / integrity.CHECKSUMS).exists():
            report.check_directory(
                step, "`flaxcap train` sets this checkpoint aside and resumes from the newest sound one"
            )
        else:
            # Orbax completes a checkpoint before its checksums are written.
            report.add(
                step / integrity.CHECKSUMS, "missing; a save is in progress or was killed", "`flaxcap train` writes it"
            )
        if not step.exists():  # a running train has deleted it meanwhile
            del report.wrong[before:]


def _verify_store(path: epath.Path, report: VerifyReport) -> None:
    if not (path / store.MANIFEST).exists() and not (path / store.COPY).exists():
        _ = store.Store(path)  # raises StoreError with a remedy
    report.check_manifest(path / store.MANIFEST)
    report.check_manifest(path / store.COPY)
    try:
        found = store.Store(path)
    except StoreError:
        found = store.Store(path, store.COPY)
    for name, expected in found.checksums.items():
        report.check_file(path / name, expected, _WRITE_AGAIN)
    if "imported_from" not in found.manifest["encoder"]:
        report.check_directory(path / store.ENCODER_DIR, _WRITE_AGAIN)
    for role in found.roles:
        split = found.split(role)
        left = split.unfinished()
        if left:
            report.add(split.path, f"shards {', '.join(map(str, left))} are not finished", "`flaxcap prepare` resumes")
        for number in split.finished():
            report.check_shard(split, role, number)


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap verify` and returns its exit status."""
    if not flags.workdir and not flags.config:
        raise UserError(
            "nothing to verify is named: give --workdir=RUN, or --config and --data_dir of a store, or both"
        )
    store_dir = store.path_for(flags.data_dir, store.resolve(flags.data_dir, config)) if flags.config else None
    report = verify(workdir=flags.workdir or None, store_dir=store_dir)
    for line in report.lines():
        print(line)
    return FAILED if report.wrong else 0
