"""Hugging Face's imagefolder: `metadata.csv` or `metadata.jsonl`, in the folder or in one folder for each split."""

import pathlib
from collections.abc import Iterator

from flaxcap.data import splits
from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.layouts.tables import read_csv, read_lines

CAPTIONS = ("text", "caption", "captions", "texts")


def _match(listing: Listing) -> list[Match]:
    found = []
    for name in ("metadata.csv", "metadata.jsonl"):
        found += [Match((file,)) for file in listing.named(name)]
        for folder in ("", "data"):
            inner = [f"{folder}/{sub}".lstrip("/") for sub in listing.subfolders(folder) if splits.is_usual(sub)]
            files = [file for sub in inner for file in listing.named(name, folder=sub)]
            found += [Match(tuple(files))] * bool(files)
    return found


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del dropped
    for file in match.files:
        folder = file.parent.relative_to(listing.root).as_posix().removeprefix(".")
        split = splits.normalised(file.parent.name) if folder else None
        yield from _in_split_folders(list(_records(file, (folder,) if folder else (), split)))


def _records(file: pathlib.Path, folders: tuple[str, ...], split: str | None) -> Iterator[ImageRecord]:
    if file.suffix.lower() == ".csv":
        return read_csv(file, ("file_name",), CAPTIONS, more=True, folders=folders, split=split)
    return read_lines(file, "file_name", CAPTIONS, more=True, folders=folders, split=split)


def _in_split_folders(records: list[ImageRecord]) -> list[ImageRecord]:
    """Takes the splits from the images' folders, if every image is in a folder with the name of a split.

    The `datasets` library names the splits after these folders too.
    """
    outer = [record.name.partition("/")[0] for record in records]
    if any(record.split for record in records) or not all(map(splits.is_usual, outer)):
        return records
    return [record._replace(split=split) for record, split in zip(records, outer, strict=True)]


LAYOUT = Layout("Hugging Face's metadata.csv or metadata.jsonl", _match, _read)
