"""The only other `.json` file of a folder, in COCO's or Karpathy's format. Counts where no other layout matches."""

from collections.abc import Iterator

from flaxcap.data.layouts import coco, json_kind, karpathy
from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match


def _match(listing: Listing) -> list[Match]:
    files = [listing.root / name for name in listing.files("", ".json")]
    inner = [name for name in listing.files("annotations", ".json") if "captions" in name]
    return [Match((file,), weak=True) for file in files + [listing.root / "annotations" / name for name in inner]]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    del listing
    (file,) = match.files
    return karpathy.records(file, dropped) if json_kind.is_karpathys(file) else coco.records(file, dropped)


LAYOUT = Layout("another .json", _match, _read)
