"""Flickr8k (Hodosh, Young and Hockenmaier 2013), from the files its authors gave out."""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds

from flaxcap.data.base import CaptionBuilder, DataError, example
from flaxcap.data.records import bad_record, image_path, read_image, read_text
from flaxcap.errors import quoted, shown

TOKENS = "Flickr8k.token.txt"
SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
IMAGES = ("Images", "Flicker8k_Dataset")  # so misspelt in the original zip

_TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")


class _Image(NamedTuple):
    path: pathlib.Path
    image_id: int
    captions: list[tuple[int, str]]  # (id, text)


class Flickr8kBuilder(CaptionBuilder):
    """Flickr8k: 8,000 photographs of people and dogs, five captions each, in the authors' three splits.

    `manual_dir` holds `Flickr8k.token.txt` (lines `NAME.jpg#N<tab>CAPTION`), `Flickr_8k.trainImages.txt`,
    `Flickr_8k.devImages.txt`, `Flickr_8k.testImages.txt` (a file name a line) and the images in `Images/` or
    `Flicker8k_Dataset/`. Without the dev or the test file there is no such split.

    image/id is the image's place, from 0, among the names in the token file; a caption's id is its own place.
    Captions of images in no split are ignored (the original has some of a missing file,
    `2258277193_586949ec62.jpg.1`); an empty caption is dropped, and an image that has no other.
    """

    name = "flickr8k"
    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        if self.manual_dir is None:
            raise DataError(f"flickr8k: expected --manual_dir to name the directory of {TOKENS} and the images")
        there = [self.manual_dir / name for name in IMAGES if (self.manual_dir / name).is_dir()]
        if not there:
            raise bad_record(self.manual_dir, "", "", "no images in it", f"a directory {' or '.join(IMAGES)}")
        tokens = self.manual_dir / TOKENS
        captions = _read_tokens(tokens)
        ids = {name: number for number, name in enumerate(captions)}
        taken: dict[str, str] = {}
        splits = {}
        for split, filename in SPLITS.items():
            file = self.manual_dir / filename
            if split != "train" and not file.is_file():
                continue
            images = []
            for where, line in _lines(file):
                name = line.strip()
                if name in taken:
                    raise bad_record(
                        file, where, "", f"{quoted(name)}, which is in {taken[name]} already", "each image once"
                    )
                if name not in captions:
                    raise bad_record(
                        file, where, "", f"{quoted(name)}, of which {tokens} has no caption", "a captioned image"
                    )
                taken[name] = f"{filename}, {where}"
                images.append(_Image(image_path(there[0], name, file, where, ""), ids[name], captions[name]))
            splits[split] = self._generate_examples(images)
        return splits

    def _generate_examples(self, images: list[_Image]) -> Iterator[tuple[int, dict]]:
        for image in images:
            if image.captions:
                yield example(read_image(image.path), image.image_id, image.path.name, image.captions)


def _read_tokens(path: pathlib.Path) -> dict[str, list[tuple[int, str]]]:
    """{image file: its captions, (id, text), without the empty ones}, in the file's order."""
    captions: dict[str, list[tuple[int, str]]] = {}
    for number, (where, line) in enumerate(_lines(path)):
        match = _TOKEN.fullmatch(line)
        if match is None:
            raise bad_record(path, where, "", shown(line), "NAME.jpg#NUMBER, a tab and the caption")
        of_image = captions.setdefault(match["name"], [])
        if match["caption"].strip():
            of_image.append((number, match["caption"].strip()))
    return captions


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """("line N", text) of the lines that are not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line
