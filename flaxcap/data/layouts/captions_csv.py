"""`captions.csv`: a row for each caption, with the columns image, caption and, optionally, split."""

from collections.abc import Iterator

from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.layouts.tables import read_csv


def _match(listing: Listing) -> list[Match]:
    return [Match((file,)) for file in listing.named("captions.csv")]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing, dropped
    return read_csv(match.files[0], ("image",), ("caption",), more=False)


LAYOUT = Layout("captions.csv", _match, _read)
