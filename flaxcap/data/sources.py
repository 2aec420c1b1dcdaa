"""The files that a prepared data set was read from: whether they have changed since.

Size and modification time detect a change, without reading a file. The content decides.
"""

import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from flaxcap.files import integrity

SOURCES = "sources.json"  # in the directory of a prepared copy


class SourceFile(NamedTuple):
    """A file as it was read."""

    size: int  # bytes; -1: there is no such file
    mtime: int  # nanoseconds
    content: str  # digest


class Sources(NamedTuple):
    """The files of a data set by their names below `root`."""

    root: str
    files: dict[str, SourceFile]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of names and contents; the times and `root` do not count."""
        found = hashlib.sha256()
        for name in sorted(self.files):
            found.update(f"{name}\0{self.files[name].content}\n".encode(errors="surrogateescape"))
        return found.hexdigest()


def look(root: pathlib.Path, names: Iterable[str], known: Sources | None = None) -> Sources:
    """Returns the files as they are now.

    Args:
      root: the directory of the user's files.
      names: the files, relative to `root`.
      known: an earlier result. A file of the same size and modification time is not read again.
    """
    files, before, start = {}, known.files if known is not None else {}, f"{root}{os.sep}"
    for name in names:
        path, old = start + name, before.get(name)
        try:
            stat = os.stat(path)
            size, mtime = stat.st_size, stat.st_mtime_ns
        except OSError:
            size, mtime = -1, 0
        if old is not None and (old.size, old.mtime) == (size, mtime):
            files[name] = old
        else:
            files[name] = SourceFile(size, mtime, _content(pathlib.Path(path)) if size >= 0 else "")
    return Sources(os.path.abspath(root), files)


def changed(known: Sources, found: Sources) -> list[str]:
    """Returns the names of the files whose content differs, or which are in one of the two alone."""
    names = [name for name in known.files if name not in found.files]
    for name, source in found.files.items():
        if name not in known.files or known.files[name].content != source.content:
            names.append(name)
    return names


def _content(path: pathlib.Path) -> str:
    """Returns a digest of a file: for a zip, of its members' names, sizes and CRC-32, which need no unpacking."""
    try:
        if path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = "\n".join(f"{m.filename}\0{m.file_size}\0{m.CRC}" for m in archive.infolist())
            return hashlib.sha256(members.encode(errors="surrogateescape")).hexdigest()[:32]
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:32]
    except Exception:  # an unreadable file is reported where it is read; Python 3.11's zipfile raises many kinds
        return "unreadable"


def read(directory: epath.Path) -> Sources | None:
    """Returns what `write` wrote, or None if the file is missing or damaged: the data set is then read again."""
    try:
        tree = json.loads((directory / SOURCES).read_bytes())
        columns = zip(tree["sizes"], tree["mtimes"], tree["contents"], strict=True)
        make = functools.partial(tuple.__new__, SourceFile)  # _make takes three times as long
        return Sources(tree["root"], dict(zip(tree["names"], map(make, columns), strict=True)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write(directory: epath.Path, found: Sources) -> None:
    """Writes SOURCES into the directory of a prepared copy.

    Raises:
      WriteError: the file cannot be written.
    """
    sizes, mtimes, contents = zip(*found.files.values(), strict=True) if found.files else ((), (), ())
    # Columns: JSON of 100,000 small lists takes 0.4 s to read.
    columns = {"root": found.root, "names": list(found.files), "sizes": sizes, "mtimes": mtimes, "contents": contents}
    # Without a checksum of its own: damage makes a file look changed, and a data set is then read again.
    integrity.write_atomically(directory / SOURCES, json.dumps(columns))
