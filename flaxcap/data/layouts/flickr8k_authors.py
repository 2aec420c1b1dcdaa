"""Flickr8k as its authors distributed it: `Flickr8k.token.txt`, and a list of images for each split."""

import pathlib
import re
from collections.abc import Iterator

from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.records import bad_record, read_text
from flaxcap.errors import quoted, shown

TOKENS = "Flickr8k.token.txt"
FOLDERS = ("", "Flickr8k_text")
SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")


def _match(listing: Listing) -> list[Match]:
    found = []
    for folder in FOLDERS:
        for tokens in listing.named(TOKENS, folder=folder):
            found.append(Match((tokens, *listing.named(*SPLITS.values(), folder=folder))))
    return found


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing
    tokens, *lists = match.files
    captions = _read_tokens(tokens)
    ids = {name: number for number, name in enumerate(captions)}
    if not lists:
        for name, (where, texts) in captions.items():
            yield ImageRecord(name, tuple(texts), tokens, where, None, ids[name], "")
        return
    assigned: dict[str, str] = {}  # {image: file and line}
    by_name = {file.name.lower(): file for file in lists}
    for split, filename in SPLITS.items():
        file = by_name.get(filename.lower(), tokens.with_name(filename))
        if split != "train" and not file.is_file():
            continue
        for where, line in _lines(file):
            name = line.strip()
            if name in assigned:
                raise bad_record(
                    file, where, "", f"{quoted(name)}, which is in {assigned[name]} already", "each image once"
                )
            assigned[name] = f"{filename}, {where}"
            _, texts = captions.get(name, ("", []))
            yield ImageRecord(name, tuple(texts), file, where, split, ids.setdefault(name, len(ids)), "")
    # The original file has captions of 2258277193_586949ec62.jpg.1, which does not exist and is in no list.
    dropped["caption{s} of images in no split"] += sum(
        len(texts) for name, (_, texts) in captions.items() if name not in assigned
    )


def _read_tokens(path: pathlib.Path) -> dict[str, tuple[str, list[str]]]:
    """Returns {image file: (its first line, its captions)}, in the file's order."""
    captions: dict[str, tuple[str, list[str]]] = {}
    for where, line in _lines(path):
        match = _TOKEN.fullmatch(line)
        if match is None:
            raise bad_record(path, where, "", shown(line), "NAME.jpg#NUMBER, a tab and the caption")
        captions.setdefault(match["name"], (where, []))[1].append(match["caption"])
    return captions


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields ("line N", text) of each line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line


LAYOUT = Layout("the authors' Flickr8k.token.txt", _match, _read)
