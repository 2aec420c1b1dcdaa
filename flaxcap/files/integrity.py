"""Atomic writes, and SHA-256 checksums of files, on disks and in object stores."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from flaxcap.errors import UserError

CHECKSUMS = "sha256.json"  # in a directory: the checksums of all its other files
_BLOCK_BYTES = 1 << 20

Progress = Callable[[int], object]  # is called with the number of bytes that were just read


class WriteError(UserError):
    """A file that cannot be written."""


class DamagedError(ValueError):
    """A file that is missing or differs from what was written. The message says how it differs."""


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file. Readers find its previous content or the complete new one, also after a crash.

    Raises:
      WriteError: the file cannot be written.
    """
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as f:
            f.write(text)
            if not is_remote(path):  # without fsync a power cut can leave the new name with an empty file
                f.flush()
                os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise WriteError(f"{path}: cannot be written ({e.strerror or e})") from e


def is_remote(path: epath.PathLike) -> bool:
    """Returns True for a path in an object store, such as gs://bucket/run."""
    return "://" in str(path)


def is_inside(name: str) -> bool:
    """Returns True for a relative name that stays below the directory it is joined to."""
    return not name.startswith("/") and ".." not in name.split("/")


# Checksums of files


class Checksum(NamedTuple):
    """The size and the SHA-256 of a file."""

    size: int  # bytes
    sha256: str

    @classmethod
    def of_bytes(cls, data: bytes) -> "Checksum":
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path: epath.Path, progress: Progress = lambda _: None) -> "Checksum":
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as f:
            while block := f.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                progress(len(block))
        return cls(size, digest.hexdigest())


def check(path: epath.Path, expected: Checksum, progress: Progress = lambda _: None) -> None:
    """Reads a file and compares it with its checksum.

    Args:
      path: the file.
      expected: the checksum of what was written.
      progress: is called for every block that is read.

    Raises:
      DamagedError: the file is missing, unreadable, or different.
    """
    try:
        found = Checksum.of_file(path, progress)
    except FileNotFoundError:
        raise DamagedError("missing") from None
    except OSError as e:
        raise DamagedError(f"cannot be read ({e.strerror or e})") from e
    _compare(found, expected)


def check_size(path: epath.Path, expected: Checksum) -> None:
    """Compares the size of a file alone, which finds a truncated file without reading it.

    Raises:
      DamagedError: the file is missing, or has another size.
    """
    try:
        size = path.stat().length
    except OSError:
        raise DamagedError("missing") from None
    if size != expected.size:
        raise DamagedError(f"damaged: found {size} bytes, expected {expected.size}")


def check_bytes(data: bytes, expected: Checksum) -> None:
    """Compares the content of a file with its checksum.

    Raises:
      DamagedError: the content is different.
    """
    _compare(Checksum.of_bytes(data), expected)


def _compare(found: Checksum, expected: Checksum) -> None:
    if found.size != expected.size:
        raise DamagedError(f"damaged: found {found.size} bytes, expected {expected.size}")
    if found != expected:
        raise DamagedError(f"damaged: found SHA-256 {found.sha256[:12]}…, expected {expected.sha256[:12]}…")


def checksums_to_json(checksums: dict[str, Checksum]) -> dict[str, dict[str, Any]]:
    return {name: checksums[name]._asdict() for name in sorted(checksums)}


def checksums_from_json(tree: Any) -> dict[str, Checksum]:
    """Returns the checksums that `checksums_to_json` was given.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: the tree holds no checksums.
    """
    return {name: Checksum(int(found["size"]), str(found["sha256"])) for name, found in tree.items()}


# JSON files that end with their own checksum


def seal(tree: dict[str, Any], indent: int | None = None) -> str:
    """Returns `tree` as JSON. The last field, `sha256`, is the SHA-256 of the JSON without it."""
    tree = {name: value for name, value in tree.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(tree, indent=indent).encode()).hexdigest()
    return json.dumps(tree | {"sha256": digest}, indent=indent) + "\n"


def unseal(data: bytes, indent: int | None = None) -> dict[str, Any]:
    """Returns the tree that `seal` wrote with this `indent`.

    Raises:
      DamagedError: a byte has changed, or the field `sha256` is missing.
      ValueError: the bytes are not a JSON object.
      RecursionError: the JSON is too deep.
    """
    tree = json.loads(data)
    if not isinstance(tree, dict):
        raise ValueError(f"found {type(tree).__name__}, expected an object")
    if seal(tree, indent).encode() != data:
        raise DamagedError("damaged: found another SHA-256 of the content than its field sha256 says")
    del tree["sha256"]
    return tree


# Directories whose files never change once written, such as Orbax's checkpoints


def write_checksums(directory: epath.Path, names: Iterable[str] | None = None) -> None:
    """Writes the checksums of a directory's files, of all files or of the named ones, to its file CHECKSUMS.

    Raises:
      WriteError: the checksums cannot be written.
    """
    names = sorted(name for name in names or names_below(directory) if name != CHECKSUMS)
    checksums = {name: Checksum.of_file(directory / name) for name in names}
    write_atomically(directory / CHECKSUMS, seal({"files": checksums_to_json(checksums)}, indent=1))


def read_checksums(directory: epath.Path) -> dict[str, Checksum]:
    """Returns the checksums that `write_checksums` wrote, by file name relative to the directory.

    Raises:
      DamagedError: the file CHECKSUMS is missing or damaged.
    """
    try:
        checksums = checksums_from_json(unseal((directory / CHECKSUMS).read_bytes(), indent=1)["files"])
        if not all(map(is_inside, checksums)):
            raise ValueError("found names of files outside the directory")
        return checksums
    except FileNotFoundError:
        raise DamagedError("missing") from None
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedError(f"damaged: {e!r}") from e


def find_damage(
    directory: epath.Path,
    progress: Progress = lambda _: None,
    among: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[epath.Path, str]]:
    """Compares the files of a directory with their checksums; the file CHECKSUMS itself is always checked.

    Args:
      directory: holds the file CHECKSUMS.
      progress: is called for every block that is read.
      among: selects files by their names relative to the directory.

    Yields:
      Each damaged file and a description of its damage.
    """
    try:
        checksums = read_checksums(directory)
    except DamagedError as e:
        yield directory / CHECKSUMS, str(e)
        return
    for name in filter(among, checksums):
        try:
            check(directory / name, checksums[name], progress)
        except DamagedError as e:
            yield directory / name, str(e)


def names_below(directory: epath.Path) -> list[str]:
    """Returns the names of all files in a directory and its subdirectories, relative to the directory."""
    return [
        (folder / name).relative_to(directory).as_posix() for folder, _, names in directory.walk() for name in names
    ]
