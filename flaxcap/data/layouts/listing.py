"""A folder's files, listed once a directory, and found by names that may differ in case or Unicode normalisation."""

import os
import pathlib
import unicodedata
from collections.abc import Sequence

from flaxcap.data.records import bad_record
from flaxcap.errors import listed, quoted

# Looked in after the folder itself, in this order; each also inside another of them.
IMAGE_FOLDERS = (
    *("images", "image", "imgs", "img", "pictures", "photos"),
    *("flickr8k_dataset", "flicker8k_dataset", "flickr8k_images", "flickr30k_images", "flickr30k-images"),
    *("train2014", "val2014", "test2014", "train2017", "val2017", "test2017"),
)


class Listing:
    """The files below a folder. A directory is read when it is first needed.

    Args:
      root: the folder.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.differing: dict[str, list[tuple[str, str]]] = {}  # {"letter case": [(name looked for, name found), …]}
        self._entries: dict[str, dict[str, bool]] = {}
        self._folded: dict[str, dict[str, list[str]]] = {}
        self._by_suffix: dict[str, dict[str, list[str]]] = {}
        self._image_folders: list[str] | None = None

    def entries(self, folder: str) -> dict[str, bool]:
        """Returns {name: it is a directory} of a folder, in the names' order. A dead link is left out."""
        if folder not in self._entries:
            found = {}
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        is_directory = entry.is_dir()
                        if is_directory or entry.is_file():  # without a stat, except for links
                            found[entry.name] = is_directory
            except (OSError, ValueError):  # ValueError: a name with a null character
                pass
            self._entries[folder] = {name: found[name] for name in sorted(found)}
        return self._entries[folder]

    def files(self, folder: str, suffix: str) -> list[str]:
        """Returns the names of a folder's files with a suffix, such as ".txt", in any case."""
        if folder not in self._by_suffix:
            found: dict[str, list[str]] = {}
            for name, is_directory in self.entries(folder).items():
                if not is_directory:
                    found.setdefault(name[name.rfind(".") :].lower(), []).append(name)
            self._by_suffix[folder] = found
        return self._by_suffix[folder].get(suffix, [])

    def subfolders(self, folder: str) -> list[str]:
        """Returns the names of a folder's directories that are not hidden."""
        return [name for name, is_directory in self.entries(folder).items() if is_directory and name[:1] != "."]

    def named(self, *names: str, folder: str = "") -> list[pathlib.Path]:
        """Returns a folder's files with these names, in any case."""
        found = [self.folded(folder).get(fold(name), []) for name in names]
        return [self.root / folder / name for some in found for name in some if not self.entries(folder)[name]]

    def find(self, name: str, first: Sequence[str], file: pathlib.Path, where: str, field: str) -> str | None:
        """Returns an image's path below the root, or None if there is no such file.

        An exact name in any image folder is preferred to one that differs in case or normalisation.

        Args:
          name: a path, as the file of captions has it.
          first: folders to look in before the root and the image folders.
          file: the file of captions, for messages.
          where: the record's name, for messages.
          field: the field's name, for messages.

        Raises:
          DataError: the path leads out of the folder, or several files differ from it in case only.
        """
        folders = [*first, "", *self.image_folders()]
        for path in (name, *first):
            if path[:1] == "/" or ".." in path.split("/") or not name.strip("./"):
                raise bad_record(file, where, field, quoted(path), f"a path inside {self.root}")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        inner, last = "/".join(parts[:-1]), parts[-1]
        for folder in folders:
            parent = join(folder, inner)
            if self.entries(parent).get(last) is False:
                return join(parent, last)
        for folder in folders:
            found = self._alike(folder, parts)
            if len(found) > 1:
                raise bad_record(file, where, field, quoted(name), f"the exact name of one of {listed(found)}")
            if found:
                same = _composed(found[0]).endswith(_composed("/".join(parts)))
                self.differing.setdefault("Unicode normalisation" if same else "letter case", []).append(
                    (name, found[0])
                )
                return found[0]
        return None

    def places(self, name: str, first: Sequence[str]) -> list[str]:
        """Returns the paths where `find` looks for the exact name, without those that no file system has."""
        paths = [join(folder, name) for folder in (*first, "", *self.image_folders())]
        return [path for path in paths if "\0" not in path]

    def namesake(self, name: str) -> str | None:
        """Returns a file whose name differs from a missing image's in the suffix alone."""
        path = pathlib.PurePosixPath(name)
        for folder in ("", *self.image_folders()):
            parent = join(folder, str(path.parent) if path.parent.parts else "")
            for other, is_directory in self.entries(parent).items():
                if not is_directory and fold(pathlib.PurePosixPath(other).stem) == fold(path.stem):
                    return join(parent, other)
        return None

    def image_folders(self) -> list[str]:
        """Returns the usual folders of images that exist below the root."""
        if self._image_folders is None:
            outer = self._usual("")
            self._image_folders = outer + [join(folder, inner) for folder in outer for inner in self._usual(folder)]
        return self._image_folders

    def _usual(self, folder: str) -> list[str]:
        found = [name for usual in IMAGE_FOLDERS for name in self.folded(folder).get(usual, [])]
        return [name for name in found if self.entries(folder)[name]]

    def folded(self, folder: str) -> dict[str, list[str]]:
        """Returns {folded name: names} of a folder."""
        if folder not in self._folded:
            folded: dict[str, list[str]] = {}
            for name in self.entries(folder):
                folded.setdefault(fold(name), []).append(name)
            self._folded[folder] = folded
        return self._folded[folder]

    def _alike(self, folder: str, parts: list[str]) -> list[str]:
        """Returns the files below `folder` whose path equals `parts` but for case and normalisation."""
        places = [folder]
        for depth, part in enumerate(parts, start=1):
            places = [
                join(place, name)
                for place in places
                for name in self.folded(place).get(fold(part), [])
                if self.entries(place)[name] == (depth < len(parts))
            ]
        wanted = _composed(join(folder, "/".join(parts)))
        return [place for place in places if _composed(place) == wanted] or places


def join(folder: str, name: str) -> str:
    """Returns `folder/name`, or the other one if one is empty."""
    return f"{folder}/{name}" if folder and name else folder or name


def fold(name: str) -> str:
    """Returns a name without the differences of letter case and Unicode normalisation."""
    return name.lower() if name.isascii() else _composed(_composed(name).casefold())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
