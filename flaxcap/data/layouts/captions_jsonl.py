"""`captions.jsonl`: a JSON object in each line, with image, caption or captions, and, optionally, split."""

from collections.abc import Iterator

from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.layouts.tables import read_lines


def _match(listing: Listing) -> list[Match]:
    return [Match((file,)) for file in listing.named("captions.jsonl")]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing, dropped
    return read_lines(match.files[0], "image", ("caption", "captions"), more=False)


LAYOUT = Layout("captions.jsonl", _match, _read)
