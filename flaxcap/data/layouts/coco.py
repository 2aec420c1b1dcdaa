"""COCO's captions in one JSON file, with "images" (id, file_name, optionally split) and "annotations"."""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from flaxcap.data.layouts import json_kind
from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.layouts.tables import parse
from flaxcap.data.records import bad_record, read_field, read_text

NO_ID, DUPLICATE = "annotation{s} without an id", "duplicate image record{s}"


class Annotated(NamedTuple):
    """An image of a COCO annotations file."""

    image_id: int
    captions: list[tuple[int, str]]  # (id, text), in the file's order, with the empty ones
    split: str | None
    where: str  # the image's record, for messages


def read_annotations(tree: object, file: object, dropped: Dropped) -> dict[str, Annotated]:
    """Returns {file name: image} of a COCO captions file, in its order. An image may have no captions.

    Args:
      tree: the parsed JSON, with "images" (id, file_name) and "annotations" (id, image_id, caption).
      file: the file's name, for messages.
      dropped: counts annotations without an id and repeated records of an image. Annotations of a repeated record
        belong to the first one.

    Raises:
      DataError: a field is missing or of another type, two files have one id, a caption's id is repeated, or a
        caption's image is not in the file.
    """
    by_name: dict[str, Annotated] = {}
    names: dict[int, str] = {}
    for index, record in enumerate(read_field(tree, "images", list, file, "")):
        where = f"images[{index}]"
        image_id = read_field(record, "id", int, file, where)
        name = read_field(record, "file_name", str, file, where)
        if names.setdefault(image_id, name) != name:
            raise bad_record(file, where, "id", f"{image_id} a second time", "an id of its own")
        if name in by_name:
            dropped[DUPLICATE] += 1
            continue
        assert isinstance(record, dict)
        split = read_field(record, "split", str, file, where) if record.get("split") is not None else None
        by_name[name] = Annotated(image_id, [], split, where)
    caption_ids: set[int] = set()
    for index, record in enumerate(read_field(tree, "annotations", list, file, "")):
        where = f"annotations[{index}]"
        if isinstance(record, dict) and (record.get("id") is None or record.get("image_id") is None):
            dropped[NO_ID] += 1
            continue
        number, image_id = (read_field(record, key, int, file, where) for key in ("id", "image_id"))
        if number in caption_ids:
            raise bad_record(file, where, "id", f"{number} a second time", "an id of its own")
        if image_id not in names:
            raise bad_record(file, where, "image_id", str(image_id), "the id of one of the images")
        caption_ids.add(number)
        by_name[names[image_id]].captions.append((number, read_field(record, "caption", str, file, where)))
    return by_name


def records(
    file: pathlib.Path, dropped: Dropped, split: str | None = None, folders: tuple[str, ...] = ()
) -> Iterator[ImageRecord]:
    """Yields the images of a COCO file.

    Args:
      file: the JSON file.
      dropped: see `read_annotations`.
      split: of the images that name none.
      folders: where the images are looked for first.
    """
    for name, image in read_annotations(parse(read_text(file), str(file)), file, dropped).items():
        captions = tuple(text for _, text in image.captions)
        where, of_image = image.where, image.split or split
        yield ImageRecord(name, captions, file, where, of_image, image.image_id, "file_name", folders)


def _match(listing: Listing) -> list[Match]:
    files = listing.named("captions.json") + listing.named("captions.json", folder="annotations")
    return [Match((file,)) for file in files if not json_kind.is_karpathys(file)]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing
    return records(match.files[0], dropped)


LAYOUT = Layout("COCO's captions.json", _match, _read)
