"""The table of layouts, and the detection of a folder's layout."""

import pathlib

from flaxcap.data.base import DataError
from flaxcap.data.layouts import (
    captions_csv,
    captions_jsonl,
    coco,
    coco_files,
    flickr8k_authors,
    flickr30k,
    imagefolder,
    kaggle_flickr8k,
    karpathy,
    other_json,
    text_files,
)
from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Layout, Match
from flaxcap.data.records import bad_record
from flaxcap.errors import cut, plain

LAYOUTS = (
    captions_csv.LAYOUT,
    captions_jsonl.LAYOUT,
    coco.LAYOUT,
    coco_files.LAYOUT,
    karpathy.LAYOUT,
    flickr30k.LAYOUT,
    imagefolder.LAYOUT,
    text_files.LAYOUT,
    kaggle_flickr8k.LAYOUT,
    flickr8k_authors.LAYOUT,
    other_json.LAYOUT,
)
FLICKR8K = (flickr8k_authors.LAYOUT, karpathy.FLICKR8K, kaggle_flickr8k.LAYOUT)


def matches(listing: Listing, layouts: tuple[Layout, ...]) -> list[tuple[Layout, Match]]:
    """Returns the layouts that match a folder, and their files. A weak match counts where there is no other."""
    found = [(layout, match) for layout in layouts for match in layout.match(listing)]
    return [(layout, match) for layout, match in found if not match.weak] or found


def only(found: list[tuple[Layout, Match]], folder: pathlib.Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Match]:
    """Returns the layout of a folder, and its files.

    Args:
      found: of `matches`.
      folder: the folder.
      layouts: those that were tried.

    Raises:
      DataError: no layout matches, or more than one does.
    """
    names = ", ".join(layout.name for layout in layouts)
    if not folder.is_dir():
        raise DataError(f"--manual_dir={folder}: found no such directory, expected one with {names}")
    if not found:
        raise bad_record(folder, "", "", "no captions file", f"one of {names} (docs/data.md shows each)")
    if len(found) > 1:
        several = "; ".join(f"{layout.name} ({_files(folder, match)})" for layout, match in found)
        raise bad_record(
            folder, "", "", f"{len(found)} layouts: {cut(several, 600)}", "files of one only; move the others away"
        )
    return found[0]


def _files(folder: pathlib.Path, match: Match) -> str:
    names = [file.relative_to(folder).as_posix() for file in match.files]
    return plain(cut(", ".join(names[:3]) + ", …" * (len(names) > 3), 200))
