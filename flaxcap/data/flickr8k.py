"""Flickr8k (Hodosh, Young and Hockenmaier 2013), from the files that its authors distributed."""

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
IMAGES = ("Images", "Flicker8k_Dataset")  # the second is misspelt in the original zip

_TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")


class _Image(NamedTuple):
    path: pathlib.Path
    image_id: int
    captions: list[tuple[int, str]]  # (id, text)


class Flickr8kBuilder(CaptionBuilder):
    """Flickr8k: 8,000 photographs of people and dogs, five captions each, in the authors' three splits.

    `manual_dir` holds the authors' files:

    - `Flickr8k.token.txt`: lines `NAME.jpg#N<tab>CAPTION`;
    - `Flickr_8k.trainImages.txt`, `Flickr_8k.devImages.txt` and `Flickr_8k.testImages.txt`: a file name a line.
      The last two may be missing: the data set then has no val or test split;
    - the images in `Images/` or `Flicker8k_Dataset/`.

    image/id numbers the images, and a caption's id the captions, from 0 in the order of the token file. Captions
    of images in no split are ignored: the original file has captions of 2258277193_586949ec62.jpg.1, which does
    not exist. Empty captions are dropped, and so are images without another caption.
    """

    name = "flickr8k"
    VERSION = tfds.core.Version("1.0.0")

    def files(self) -> list[pathlib.Path]:
        assert self.manual_dir is not None
        splits = [file for file in self.index()[1:] if file.is_file()]
        folder = next((self.manual_dir / name for name in IMAGES if (self.manual_dir / name).is_dir()), self.manual_dir)
        return [*self.index(), *(folder / line.strip() for file in splits for _, line in _lines(file))]

    def index(self) -> list[pathlib.Path]:
        assert self.manual_dir is not None
        return [self.manual_dir / name for name in (TOKENS, *SPLITS.values())]

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        if self.manual_dir is None:
            raise DataError(f"--manual_dir: found none, expected the directory of {TOKENS} and the images")
        directories = [self.manual_dir / name for name in IMAGES if (self.manual_dir / name).is_dir()]
        if not directories:
            raise bad_record(self.manual_dir, "", "", "no directory of images", f"a directory {' or '.join(IMAGES)}")
        tokens = self.manual_dir / TOKENS
        captions = _read_tokens(tokens)
        ids = {name: number for number, name in enumerate(captions)}
        assigned: dict[str, str] = {}  # {image: file and line}
        splits = {}
        for split, filename in SPLITS.items():
            file = self.manual_dir / filename
            if split != "train" and not file.is_file():
                continue
            images = []
            for where, line in _lines(file):
                name = line.strip()
                if name in assigned:
                    raise bad_record(
                        file, where, "", f"{quoted(name)}, which is in {assigned[name]} already", "each image once"
                    )
                if name not in captions:
                    raise bad_record(
                        file, where, "", f"{quoted(name)}, which has no caption in {tokens}", "a captioned image"
                    )
                assigned[name] = f"{filename}, {where}"
                images.append(_Image(image_path(directories[0], name, file, where, ""), ids[name], captions[name]))
            splits[split] = self._generate_examples(images)
        return splits

    def _generate_examples(self, images: list[_Image]) -> Iterator[tuple[int, dict]]:
        for image in images:
            if image.captions:
                yield example(read_image(image.path), image.image_id, image.path.name, image.captions)


def _read_tokens(path: pathlib.Path) -> dict[str, list[tuple[int, str]]]:
    """Returns {image file: [(id, text), …]}, in the file's order, without empty captions."""
    captions: dict[str, list[tuple[int, str]]] = {}
    for number, (where, line) in enumerate(_lines(path)):
        match = _TOKEN.fullmatch(line)
        if match is None:
            raise bad_record(path, where, "", shown(line), "NAME.jpg#NUMBER, a tab and the caption")
        image_captions = captions.setdefault(match["name"], [])
        if match["caption"].strip():
            image_captions.append((number, match["caption"].strip()))
    return captions


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields ("line N", text) of each line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line
