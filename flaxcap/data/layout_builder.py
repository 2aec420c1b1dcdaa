"""Base of the data sets that are read from a folder in one of several layouts."""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from flaxcap.data.base import CaptionBuilder, example
from flaxcap.data.gather import CaptionedImage, Splits, check_missing, gather, report
from flaxcap.data.layouts import detect
from flaxcap.data.layouts.listing import Listing
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match
from flaxcap.data.records import bad_record, read_image
from flaxcap.errors import quoted


class _Source(NamedTuple):
    listing: Listing
    layout: Layout
    match: Match


class _Contents(NamedTuple):
    images: Splits
    dropped: Dropped
    missing: str  # a line about the images without a file, or ""


class LayoutBuilder(CaptionBuilder):
    """Base of the data sets in `manual_dir` that have one of several layouts.

    A missing image becomes an example with an empty file, which extraction counts as unreadable.
    """

    layouts: tuple[Layout, ...] = ()
    _contents_: _Contents | None = None

    @functools.cached_property
    def _listing(self) -> Listing:
        assert self.manual_dir is not None
        return Listing(self.manual_dir)

    @functools.cached_property
    def _matches(self) -> list[tuple[Layout, Match]]:
        return detect.matches(self._listing, self.layouts)

    def _source(self) -> _Source:
        """Returns the folder's layout. Raises DataError unless there is exactly one."""
        return _Source(self._listing, *detect.only(self._matches, self._listing.root, self.layouts))

    def _contents(self) -> _Contents:
        """Returns the images, read from the files of captions.

        Raises:
          DataError: a record is bad, or more images than allowed are missing.
        """
        if self._contents_ is None:
            listing, layout, match = self._source()

            def find(record: ImageRecord) -> str | None:
                return listing.find(record.name, record.folders, record.file, record.where, record.field)

            dropped = Dropped()
            images = gather(layout.read(match, listing, dropped), find, dropped)
            # Before `copies.write` reads every image for its digest.
            missing = check_missing(self.name, images, self.max_bad_fraction, _places(listing), self._hint)
            self._contents_ = _Contents(images, dropped, missing)
        return self._contents_

    def files(self) -> list[pathlib.Path]:
        """Returns the files of captions and splits, the images, and every place where a missing one may appear."""
        listing, _, match = self._source()
        found: dict[str, None] = {}
        for image in (image for images in self._contents().images.values() for image in images):
            if image.location:
                found[image.location] = None
            else:
                found |= dict.fromkeys(listing.places(image.record.name, image.record.folders))
        start = f"{listing.root}{os.sep}"
        return [*match.files, *(pathlib.Path(start + location) for location in found)]

    def index(self) -> list[pathlib.Path]:
        """Returns the files of captions and splits; [] where the folder is gone or holds none."""
        return list(self._source().match.files) if self._matches else []

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        listing, _, match = self._source()
        images, dropped, missing = self._contents()
        if not images:
            raise bad_record(match.files[0], "", "", "no captions", "at least one")
        for what, pairs in listing.differing.items():
            asked, found = pairs[0]
            logging.warning(
                "%s: image names that differ from their files' in %s: %d; the first is %s, found as %s",
                self.name, what, len(pairs), quoted(asked), quoted(found),
            )  # fmt: skip
        report(self.name, images, dropped, missing)
        return {split: self._generate_examples(found) for split, found in images.items()}

    def _hint(self, image: CaptionedImage) -> str:
        other = self._source().listing.namesake(image.record.name)
        return f" (there is {quoted(other)})" if other else ""

    def _generate_examples(self, images: list[CaptionedImage]) -> Iterator[tuple[int, dict]]:
        assert self.manual_dir is not None
        first = 0
        for image in images:
            file = read_image(self.manual_dir / image.location) if image.location else b""
            yield example(file, image.image_id, image.filename, enumerate(map(str.strip, image.captions), first))
            first += len(image.captions)


def _places(listing: Listing) -> str:
    inner = "".join(f", in its {folder}/" for folder in listing.image_folders())
    return f"{listing.root}{inner}"
