"""Karpathy's JSON for Flickr8k, Flickr30k and COCO: images with filename, split and sentences."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from flaxcap.data.base import DataError
from flaxcap.data.layouts import json_kind
from flaxcap.data.layouts.coco import DUPLICATE
from flaxcap.data.layouts.listing import Listing, join
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.records import read_field, read_text

_WANTED = {"images", "filename", "filepath", "split", "imgid", "cocoid", "sentences", "raw"}


def load(text: str | bytes, name: str, without: tuple[str, ...] = ()) -> object:
    """Parses the JSON without its tokens. As Python objects, those of COCO take gigabytes.

    Args:
      text: the JSON.
      name: the file's name, for messages.
      without: further keys that are left out.
    """
    wanted = _WANTED.difference(without)
    try:
        return json.loads(text, object_hook=lambda record: {key: record[key] for key in wanted & record.keys()})
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON in UTF-8: {error}") from error


def images(tree: object, file: object, dropped: Dropped) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields the record's name, the file name, the split and the record of each image.

    Args:
      tree: the parsed JSON.
      file: the file's name, for messages.
      dropped: counts repeated records of an image.
    """
    seen: set[str] = set()
    for index, record in enumerate(read_field(tree, "images", list, file, "")):
        where = f"images[{index}]"
        filename, split = (read_field(record, key, str, file, where) for key in ("filename", "split"))
        assert isinstance(record, dict)
        name = join(read_field(record, "filepath", str, file, where) if "filepath" in record else "", filename)
        if name in seen:
            dropped[DUPLICATE] += 1
            continue
        seen.add(name)
        yield where, filename, split, record


def records(file: pathlib.Path, dropped: Dropped) -> Iterator[ImageRecord]:
    """Yields the images of a file, see `images` for `dropped`."""
    tree = load(read_text(file), str(file))
    for where, filename, split, record in images(tree, file, dropped):
        sentences = read_field(record, "sentences", list, file, where)
        captions = tuple(
            read_field(sentence, "raw", str, file, f"{where}, sentences[{number}]")
            for number, sentence in enumerate(sentences)
        )
        keys = [key for key in ("cocoid", "imgid") if key in record]
        image_id = read_field(record, keys[0], int, file, where) if keys else None
        folders = (record["filepath"],) if record.get("filepath") else ()
        yield ImageRecord(filename, captions, file, where, split, image_id, "filename", folders)


def _match(listing: Listing) -> list[Match]:
    files = listing.named(*(f"dataset_{name}.json" for name in ("flickr8k", "flickr30k", "coco")))
    files += filter(json_kind.is_karpathys, listing.named("dataset.json", "captions.json"))
    return [Match((file,)) for file in files]


def _match_flickr8k(listing: Listing) -> list[Match]:
    return [Match((file,)) for file in listing.named("dataset_flickr8k.json", "dataset.json")]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing
    return records(match.files[0], dropped)


LAYOUT = Layout("Karpathy's JSON", _match, _read)
FLICKR8K = Layout("Karpathy's dataset_flickr8k.json", _match_flickr8k, _read)
