"""Kaggle's Flickr8k and Flickr30k: `captions.txt`, a table with image and caption, beside a folder of images."""

from collections.abc import Iterator

from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.layouts.tables import read_csv


def _match(listing: Listing) -> list[Match]:
    return [Match((file,)) for file in listing.named("captions.txt")]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing, dropped
    return read_csv(match.files[0], ("image", "image_name"), ("caption", "comment"), more=True)


LAYOUT = Layout("Kaggle's captions.txt", _match, _read)
