"""`NAME.txt` next to `NAME.jpg`: a caption in each line, as LoRA trainers have it."""

import os
from collections.abc import Iterator

from flaxcap.data import splits
from flaxcap.data.layouts.listing import Listing, join
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.records import check_text, read_text
from flaxcap.images import formats

DEPTH = 2  # folders in the folder, as in img/10_dog/NAME.jpg


def _match(listing: Listing) -> list[Match]:
    folders = (folder for folder in _folders(listing, "", DEPTH) if listing.files(folder, ".txt"))
    texts = [text for folder in folders for _, text in _pairs(listing, folder) if text]
    return [Match(tuple(listing.root / text for text in dict.fromkeys(texts)))] if texts else []


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del match
    for folder in _folders(listing, "", DEPTH):
        pairs = list(_pairs(listing, folder))
        used = {text for _, text in pairs}
        dropped["text file{s} without an image"] += sum(
            join(folder, name) not in used for name in listing.files(folder, ".txt")
        )
        outer = folder.partition("/")[0]
        split = outer if splits.is_usual(outer) else None
        for image, text in pairs:
            file = listing.root / (text or image)
            check_text(image, file, "", "")
            lines = read_text(file).split("\n") if text else []
            captions = tuple(line for line in lines if line.strip()) or ("",) * bool(text)
            yield ImageRecord(image, captions, file, "", split, field="")


def _folders(listing: Listing, folder: str, depth: int) -> Iterator[str]:
    yield folder
    if depth:
        for name in listing.subfolders(folder):
            yield from _folders(listing, join(folder, name), depth - 1)


def _pairs(listing: Listing, folder: str) -> Iterator[tuple[str, str | None]]:
    """Yields each image of a folder and its text file, or None."""
    suffixes = formats.suffixes()
    texts = {os.path.splitext(name)[0]: name for name in listing.files(folder, ".txt")}
    for name, is_directory in listing.entries(folder).items():
        stem, suffix = os.path.splitext(name)  # pathlib takes ten times as long (Python 3.11)
        if not is_directory and suffix.lower() in suffixes:
            text = texts.get(stem)
            yield join(folder, name), text and join(folder, text)


LAYOUT = Layout("NAME.txt next to NAME.jpg", _match, _read)
