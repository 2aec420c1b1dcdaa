"""The record that every layout is read into, and the interface of a layout."""

import collections
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flaxcap.data.layouts.listing import Listing

Dropped = collections.Counter[
    str
]  # {"annotation{s} without an id": number}; a number other than 1 puts an s in the place


class ImageRecord(NamedTuple):
    """An image with some of its captions. A file may have several records of one image."""

    name: str  # a path below the folder, or below one of its image folders
    captions: tuple[str, ...]  # with the empty ones
    file: pathlib.Path  # the file of captions
    where: str  # the record's name in messages, such as "line 3"
    split: str | None = None  # as the file spells it
    image_id: int | None = None  # None: images are numbered from 0
    field: str = "image"  # the field of the name, for messages; may be empty
    folders: tuple[str, ...] = ()  # where to look first: the folders of this file's split


class Match(NamedTuple):
    """Files of captions that a layout recognised."""

    files: tuple[pathlib.Path, ...]  # all that the layout reads besides the images
    weak: bool = False  # recognised by its suffix alone: counts only where no other layout matches


class Layout(NamedTuple):
    """A layout of a folder of images and captions.

    `match(listing)` returns one match for each set of files that could be the captions, [] if there is none.
    `read(match, listing, dropped)` yields the records of one match, and counts in `dropped` what it leaves out.
    """

    name: str  # in messages and in docs/data.md
    match: Callable[[Listing], list[Match]]
    read: Callable[[Match, Listing, Dropped], Iterator[ImageRecord]]
