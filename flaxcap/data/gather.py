"""Joins the records of a data set to images with captions, and tells what is left out or missing."""

import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from absl import logging

from flaxcap.data import splits
from flaxcap.data.base import DataError
from flaxcap.data.layouts.record import Dropped, ImageRecord
from flaxcap.data.records import bad_record
from flaxcap.errors import quoted, shown

EMPTY, NO_CAPTION = "empty caption{s}", "image{s} without a caption"
SHOWN = 10  # missing images in a message


class CaptionedImage(NamedTuple):
    """An image of a data set."""

    filename: str
    image_id: int
    captions: tuple[str, ...]  # as the file has them, without the empty ones
    location: str | None  # the file's path below the folder, or in the archive; None: there is no such file
    record: ImageRecord  # its first record, for messages


class _Group:
    """The records of one image, while they are joined."""

    __slots__ = ("captions", "location", "record")

    def __init__(self, record: ImageRecord, location: str | None):
        self.record, self.location = record, location
        self.captions: list[str] = []


Splits = dict[str, list[CaptionedImage]]


def gather(records: Iterable[ImageRecord], find: Callable[[ImageRecord], str | None], dropped: Dropped) -> Splits:
    """Joins records to images, in the order of each image's first record.

    Args:
      records: of all files of captions. Records of one file with one location belong to one image.
      find: returns an image's location, or None.
      dropped: counts empty captions, and images without another caption.

    Returns:
      The images of each split. Without a split but train they are split by `split_by_name`.

    Raises:
      DataError: a split's name is bad or not the same in all records of an image, or two images have one id.
    """
    groups = _group(records, find)
    numbered = any(group.record.image_id is None for group in groups)
    images: Splits = {}
    for number, group in enumerate(groups):
        record = group.record
        captions = tuple(text for text in group.captions if text and not text.isspace())
        dropped[EMPTY] += len(group.captions) - len(captions)
        if not captions:
            dropped[NO_CAPTION] += 1
            continue
        split = "train" if record.split is None else splits.normalised(record.split)
        # Each split has a folder, and train/1.jpg and val/1.jpg are two images: the name includes the folder.
        filename = group.location if group.location and record.folders else record.name
        image_id = number if numbered or record.image_id is None else record.image_id
        images.setdefault(split, []).append(CaptionedImage(filename, image_id, captions, group.location, record))
    for found in images.values():
        _check_ids(found)
    return _split(images["train"]) if set(images) == {"train"} else images


def _split(images: list[CaptionedImage]) -> Splits:
    by_name = {image.filename: image for image in images}
    names = splits.split_by_name(list(by_name))
    return {split: [by_name[name] for name in found] for split, found in names.items() if found}


def _group(records: Iterable[ImageRecord], find: Callable[[ImageRecord], str | None]) -> list[_Group]:
    groups: list[_Group] = []
    tables: dict[pathlib.Path, tuple[dict[str, _Group], dict[str, _Group]]] = {}
    has_splits, file, by_name, by_location = None, None, {}, {}
    for record in records:
        if record.file is not file:  # a path's hash takes longer than the rest of this loop
            file = record.file
            by_name, by_location = tables.setdefault(file, ({}, {}))
        group = by_name.get(record.name)
        if group is None:
            has_splits = record.split is not None if has_splits is None else has_splits
            _check_split(record, has_splits)
            location = find(record)
            # Another spelling of the same file is the same image.
            group = by_location.get(location) if location else None
            if group is None:
                group = _Group(record, location)
                groups.append(group)
            by_name[record.name] = group
            if location:
                by_location[location] = group
        if record.split != group.record.split:
            _check_split(record, bool(has_splits))
            expected = f"{quoted(group.record.split)}, the split of this image's other captions"
            raise bad_record(record.file, record.where, "split", shown(record.split), expected)
        group.captions += record.captions
    return groups


def _check_split(record: ImageRecord, has_splits: bool) -> None:
    if (record.split is not None) != has_splits:
        expected = "a split in every record, or in none"
        raise bad_record(record.file, record.where, "split", shown(record.split), expected)
    if record.split is not None and not splits.is_possible(splits.normalised(record.split)):
        expected = "a name of letters, such as train or val"
        raise bad_record(record.file, record.where, "split", shown(record.split), expected)


def _check_ids(images: list[CaptionedImage]) -> None:
    ids: set[int] = set()
    for image in images:
        if image.image_id in ids:
            where, file = image.record.where, image.record.file
            raise bad_record(file, where, "id", f"{image.image_id} a second time", "an id of its own")
        ids.add(image.image_id)


def report(name: str, images: Splits, dropped: Dropped, missing: str) -> None:
    """Prints a line each about dropped records, images without a caption, missing images, and splits by a hash.

    Args:
      name: the data set's.
      images: of each split.
      dropped: the numbers of dropped records.
      missing: the line of `check_missing`.
    """
    counts = [_count(what, number) for what, number in dropped.items() if number and what != NO_CAPTION]
    if counts:
        logging.warning("%s: left out %s", name, ", ".join(counts))
    if dropped[NO_CAPTION]:
        logging.warning("%s: left out %s", name, _count(NO_CAPTION, dropped[NO_CAPTION]))
    if missing:
        logging.warning("%s", missing)
    records = [(split, image.record) for split, found in images.items() for image in found]
    if all(record.split is None or splits.normalised(record.split) == "train" for _, record in records):
        why = "the captions name no split" if records[0][1].split is None else "the captions name no split but train"
        counts = ", ".join(f"{len(found)} {split}" for split, found in images.items())
        print(f"{name}: {why}; a hash of each image's name made the splits: {counts}")


def _count(what: str, number: int) -> str:
    return f"{number} {what.format(s='' if number == 1 else 's')}"


def check_missing(
    name: str, images: Splits, most: float, place: str, hint: Callable[[CaptionedImage], str] = lambda image: ""
) -> str:
    """Returns a line with the images that have no file, or "".

    Args:
      name: the data set's.
      images: of each split.
      most: the largest fraction of a split's images that may be missing.
      place: where the images are looked for, for messages.
      hint: returns a remark about a missing image, or "".

    Raises:
      DataError: more images of a split are missing. The message lists the first ones of all splits.
    """
    missing = {split: [image for image in found if image.location is None] for split, found in images.items()}
    every = [image for found in missing.values() for image in found]
    if not every:
        return ""
    total = sum(map(len, images.values()))
    count = f"{name}: found no file for {len(every)} of {total} images"
    bad = [split for split, found in missing.items() if len(found) > most * len(images[split])]
    if not bad:
        first = ", ".join(quoted(image.record.name) for image in every[:SHOWN])
        return f"{count}; they are skipped like unreadable ones: {first}{', …' * (len(every) > SHOWN)}"
    lines = [_where(image) + hint(image) for image in every[:SHOWN]]
    more = [f"  and {len(every) - SHOWN} more"] * (len(every) > SHOWN)
    shares = ", ".join(f"{split} lacks {len(missing[split])} of {len(images[split])}" for split in bad)
    first = f"{count}, more than --max_bad_fraction={most} allows ({shares}); expected image files in {place}:"
    raise DataError("\n".join([first, *lines, *more]))


def _where(image: CaptionedImage) -> str:
    record, field = image.record, f"field {image.record.field!r}" if image.record.field else ""
    return f"  {', '.join(filter(None, (str(record.file), record.where, field)))}: found {quoted(record.name)}"
