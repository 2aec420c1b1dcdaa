"""Files that are seen whole or not at all, and that are known again by their SHA-256, on disks and object stores."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from flaxcap.errors import UserError

SUMS = "sha256.json"  # of a directory's files, in the directory itself
_BLOCK_BYTES = 1 << 20


class WriteError(UserError):
    """A file that cannot be written."""


class Sum(NamedTuple):
    """What a file is known again by."""

    size: int  # bytes
    sha256: str


class DamagedError(ValueError):
    """What was read is not what was written; the message tells what was found."""


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that is seen whole or not at all. WriteError if it cannot be written."""
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as f:
            f.write(text)
            if not is_remote(path):  # else a power cut could leave the name without the text
                f.flush()
                os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise WriteError(f"{path}: cannot be written ({e.strerror or e})") from e


def is_remote(path: epath.PathLike) -> bool:
    """Whether it is a place in an object store."""
    return "://" in str(path)


def of_bytes(data: bytes) -> Sum:
    return Sum(len(data), hashlib.sha256(data).hexdigest())


def of_file(path: epath.Path, tell: Callable[[int], object] = lambda _: None) -> Sum:
    """Of what is there now; `tell` hears how many bytes were read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as f:
        while block := f.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            tell(len(block))
    return Sum(size, digest.hexdigest())


def check(path: epath.Path, expected: Sum, tell: Callable[[int], object] = lambda _: None) -> None:
    """DamagedError unless the file is there and is as it was written."""
    try:
        found = of_file(path, tell)
    except FileNotFoundError:
        raise DamagedError("missing") from None
    except OSError as e:
        raise DamagedError(f"cannot be read ({e.strerror or e})") from e
    _compare(found, expected)


def check_size(path: epath.Path, expected: Sum) -> None:
    """DamagedError unless a file of this size is there: one that was cut off is found without being read."""
    try:
        size = path.stat().length
    except OSError:
        raise DamagedError("missing") from None
    if size != expected.size:
        raise DamagedError(f"damaged: found {size} bytes, expected {expected.size}")


def check_bytes(data: bytes, expected: Sum) -> None:
    """DamagedError unless these are the bytes that were written."""
    _compare(of_bytes(data), expected)


def _compare(found: Sum, expected: Sum) -> None:
    if found.size != expected.size:
        raise DamagedError(f"damaged: found {found.size} bytes, expected {expected.size}")
    if found != expected:
        raise DamagedError(f"damaged: found SHA-256 {found.sha256[:12]}…, expected {expected.sha256[:12]}…")


# JSON that holds its own sum


def seal(tree: dict[str, Any], indent: int | None = None) -> str:
    """JSON of `tree`, and of a last field `sha256`, the sum of what stands before it."""
    tree = {name: value for name, value in tree.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(tree, indent=indent).encode()).hexdigest()
    return json.dumps(tree | {"sha256": digest}, indent=indent) + "\n"


def unseal(data: bytes, indent: int | None = None) -> dict[str, Any]:
    """Returns what `seal` was given.

    DamagedError if a byte of it has changed; ValueError or RecursionError if it is not an object of JSON.
    """
    tree = json.loads(data)
    if not isinstance(tree, dict):
        raise ValueError(f"found {type(tree).__name__}, expected an object")
    if seal(tree, indent).encode() != data:
        raise DamagedError("damaged: it does not match the SHA-256 that it should end with")
    del tree["sha256"]
    return tree


def is_inside(name: str) -> bool:
    """Whether a name that was read somewhere stays below the directory that it is meant for."""
    return not name.startswith("/") and ".." not in name.split("/")


def to_json(sums: dict[str, Sum]) -> dict[str, dict[str, Any]]:
    return {name: sums[name]._asdict() for name in sorted(sums)}


def from_json(tree: Any) -> dict[str, Sum]:
    """ValueError, KeyError, TypeError or AttributeError if they are none."""
    return {name: Sum(int(found["size"]), str(found["sha256"])) for name, found in tree.items()}


# The files of a directory that are written once, such as Orbax's


def write_sums(directory: epath.Path, names: Iterable[str] | None = None) -> None:
    """Notes in a finished directory the sums of all files below it, or of these. WriteError if it cannot."""
    names = sorted(name for name in names or names_below(directory) if name != SUMS)
    sums = {name: of_file(directory / name) for name in names}
    write_whole(directory / SUMS, seal({"files": to_json(sums)}, indent=1))


def read_sums(directory: epath.Path) -> dict[str, Sum]:
    """What `write_sums` noted, by the names below `directory`. DamagedError if that is missing or damaged."""
    try:
        sums = from_json(unseal((directory / SUMS).read_bytes(), indent=1)["files"])
        if not all(map(is_inside, sums)):
            raise ValueError("it names files outside of its directory")
        return sums
    except FileNotFoundError:
        raise DamagedError("missing") from None
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedError(f"damaged: {e!r}") from e


def damages(
    directory: epath.Path,
    tell: Callable[[int], object] = lambda _: None,
    among: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[epath.Path, str]]:
    """The files below a directory (`among` their names there) that are not as `write_sums` found them, and what they
    are now.
    """
    try:
        sums = read_sums(directory)
    except DamagedError as e:
        yield directory / SUMS, str(e)
        return
    for name in filter(among, sums):
        try:
            check(directory / name, sums[name], tell)
        except DamagedError as e:
            yield directory / name, str(e)


def names_below(directory: epath.Path) -> list[str]:
    """All files of a directory and those in it, named from there."""
    return [
        (folder / name).relative_to(directory).as_posix() for folder, _, names in directory.walk() for name in names
    ]
