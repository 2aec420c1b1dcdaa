"""The images that a command line names: files, directories and web addresses."""

import collections
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import NamedTuple

from flaxcap.errors import listed
from flaxcap.files import integrity
from flaxcap.images import formats

_NOT_AN_IMAGE = f"not an image (expected {', '.join(formats.FORMATS)})"


class FoundImage(NamedTuple):
    """A file or an address; or a source that cannot be read, with the reason."""

    name: str
    reason: str = ""


class ImageSources:
    """The images of files, directories and addresses, in their order; those of a directory are sorted by name.

    A directory's images are the files with a suffix of `formats.suffixes()`, and those that begin as an image.

    Attributes:
      images: names of files and addresses.
      failed: sources that cannot be read.
      skipped: for each reason, the files of directories that are left out.
      subdirectories: of the directories, without `recursive`.
    """

    def __init__(self, names: list[str], *, recursive: bool = False):
        """Lists the directories. `recursive`: their subdirectories, too, but for links to directories."""
        self.skipped: dict[str, list[str]] = collections.defaultdict(list)
        self.subdirectories: list[str] = []
        self._recursive, self._suffixes = recursive, formats.suffixes()
        found = [image for name in names for image in self._of(name)]
        self.images = [image.name for image in found if not image.reason]
        self.failed = [image for image in found if image.reason]

    def notes(self) -> list[str]:
        """Returns a line for each reason why files are left out, and one for subdirectories."""
        lines = [
            f"skipped {_files(len(names))}: {reason}: {listed(map(os.path.basename, names))}"
            for reason, names in self.skipped.items()
        ]
        if count := len(self.subdirectories):
            noun = "subdirectory was" if count == 1 else "subdirectories were"
            lines.append(f"{count} {noun} not read: {listed(self.subdirectories)}; --recursive reads them")
        return lines

    def _of(self, name: str) -> Iterator[FoundImage]:
        """Yields the images of a source."""
        if integrity.is_remote(name):
            yield FoundImage(name)
            return
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            found = list(self._in(path))
            if not found:
                found = [FoundImage(name, "found no image in the directory, expected " + ", ".join(formats.FORMATS))]
            yield from found
        elif os.path.isfile(path):
            yield FoundImage(path)
        elif _is_dead_link(path):
            yield _dead_link(path)
        else:
            yield FoundImage(name, "no such file or directory, and not an http(s) address")

    def _in(self, directory: str) -> Iterator[FoundImage]:
        """Yields the images of a directory, sorted by name."""
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as e:
            yield FoundImage(directory, f"cannot be read: {e.strerror}")
            return
        for entry in entries:
            if entry.is_dir():
                if not self._recursive:
                    self.subdirectories.append(entry.path)
                elif entry.is_symlink():  # it may lead back here
                    self.skipped["a link to a directory"].append(entry.path)
                else:
                    yield from self._in(entry.path)
            elif not entry.is_file():
                if _is_dead_link(entry.path):
                    yield _dead_link(entry.path)
                else:
                    self.skipped["neither a file nor a directory"].append(entry.path)
            elif reason := self._why_not(entry.path):
                self.skipped[reason].append(entry.path)
            else:
                yield FoundImage(entry.path)

    def _why_not(self, file: str) -> str:
        """Returns the reason why a file of a directory is left out, "" if it is not."""
        if pathlib.PurePath(file).suffix.lower() in self._suffixes:
            return ""
        try:
            with open(file, "rb") as opened:
                beginning = opened.read(formats.BEGINNING)
        except OSError as e:
            return f"cannot be read ({e.strerror})"
        if formats.format_of(beginning) in formats.FORMATS:
            return ""
        return formats.unreadable(beginning) or _NOT_AN_IMAGE


def _is_dead_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode) and not os.path.exists(path)
    except (OSError, ValueError):
        return False


def _dead_link(path: str) -> FoundImage:
    return FoundImage(path, f"a dead link: there is no {os.readlink(path)}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
