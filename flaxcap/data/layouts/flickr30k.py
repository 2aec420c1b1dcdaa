"""Flickr30k's `results.csv`: `image_name| comment_number| comment`, without quotes."""

import re
from collections.abc import Iterator

from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.records import bad_record, read_text
from flaxcap.errors import shown

FOLDERS = ("", "flickr30k_images", "flickr30k-images")
# The number before a caption. Image 2199200615.jpg of the published file lacks the separator after its 4.
_NUMBER = re.compile(r"\s*\d+(\s+|$)")


def _match(listing: Listing) -> list[Match]:
    return [Match((file,)) for folder in FOLDERS for file in listing.named("results.csv", folder=folder)]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing, dropped
    (file,) = match.files
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        where, values = f"line {number}", [value.strip() for value in line.split("|", 2)]
        if number == 1:
            if values != ["image_name", "comment_number", "comment"]:
                raise bad_record(file, where, "", shown(line), "image_name| comment_number| comment")
        elif len(values) == 3 and (not values[1] or values[1].isdecimal()):
            yield ImageRecord(values[0], (values[2],), file, where, field="image_name")
        elif len(values) > 1:
            # The number or a separator is missing: a caption begins after the number, if there is one.
            comment = "|".join(line.split("|")[1:])
            yield ImageRecord(values[0], (_NUMBER.sub("", comment, 1).strip(),), file, where, field="image_name")
        elif line.strip():
            raise bad_record(file, where, "", shown(line), "an image's name, | and its caption")


LAYOUT = Layout("Flickr30k's results.csv", _match, _read)
