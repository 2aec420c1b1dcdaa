"""The user's own data set: a folder of images with a file of captions."""

import csv
import functools
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from flaxcap.data.base import CaptionBuilder, DataError, example
from flaxcap.data.coco_captions import read_annotations
from flaxcap.data.records import bad_record, check_text, image_path, read_field, read_image, read_text
from flaxcap.errors import listed, quoted, shown

COLUMNS = ("image", "caption", "split")
LINE_KEYS = ("image", "caption", "captions", "split")
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


class CaptionRecord(NamedTuple):
    """A caption, and the name of its record for messages."""

    image: str  # path below the folder
    text: str
    split: str | None
    where: str


class _Image(NamedTuple):
    filename: str
    image_id: int
    captions: list[tuple[int, str]]  # (id, text)
    split: str | None


class FolderBuilder(CaptionBuilder):
    """A folder (`manual_dir`) of images, in any subfolders, with one file of captions. The file is one of

    - `captions.csv`: a header and the columns image, caption and, optionally, split; a row a caption;
    - `captions.jsonl`: a JSON object a line, {"image": ..., "caption": ...} or
      {"image": ..., "captions": [...]}, optionally with "split";
    - COCO annotations: `captions.json`, or the folder's only `.json` file, with "images" (id, file_name) and
      "annotations" (id, image_id, caption). Images without a caption are left out.

    Images are named by their paths below the folder. image/id is COCO's id, or numbers the images from 0 in the
    order of the file. `split_by_name` makes the splits if the file has none.

    The prepared copy's path contains the folder's name.
    """

    name = "folder"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, manual_dir, **kwargs):
        if manual_dir is None:
            raise DataError("--manual_dir: found none, expected the folder of images and captions")
        folder = pathlib.Path(manual_dir).expanduser()
        self.captions_file = _captions_file(folder)
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name) or "root"
        super().__init__(manual_dir=folder, variant=name, **kwargs)

    @functools.cached_property
    def _images(self) -> dict[str, _Image]:
        captions, ids = _READERS[self.captions_file.suffix](read_text(self.captions_file), self.captions_file)
        return _group(captions, ids, self.captions_file)

    def files(self) -> list[pathlib.Path]:
        assert self.manual_dir is not None
        return [*self.index(), *(self.manual_dir / name for name in self._images)]

    def index(self) -> list[pathlib.Path]:
        return [self.captions_file]

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        file = self.captions_file
        images = self._images
        if not images:
            raise bad_record(file, "", "", "no captions", "at least one")
        if next(iter(images.values())).split is None:
            splits = split_by_name(list(images))
        else:
            splits = {}
            for name, image in images.items():
                splits.setdefault(image.split, []).append(name)
        return {split: self._generate_examples([images[name] for name in names]) for split, names in splits.items()}

    def _generate_examples(self, images: list[_Image]) -> Iterator[tuple[int, dict]]:
        assert self.manual_dir is not None
        for image in images:
            file = read_image(self.manual_dir / image.filename)
            yield example(file, image.image_id, image.filename, image.captions)


def split_by_name(names: list[str]) -> dict[str, list[str]]:
    """Splits names by their SHA-256: about 90% train, 5% val, 5% test, each in the given order.

    A name keeps its split when other names are added or removed, with one exception: train is never empty, and
    val is not if there are two names. Without a hash in its range, val gets the name with the highest hash, and
    train the name with the lowest.
    """
    rank = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    split_of = {name: "train" if r < 0.9 else "val" if r < 0.95 else "test" for name, r in rank.items()}
    if len(names) >= 2 and "val" not in split_of.values():
        split_of[max(names, key=rank.__getitem__)] = "val"
    if "train" not in split_of.values():
        split_of[min(names, key=rank.__getitem__)] = "train"
    return {split: [name for name in names if split_of[name] == split] for split in ("train", "val", "test")}


def _captions_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder's file of captions; DataError unless there is exactly one."""
    expected = "captions.csv, captions.jsonl, captions.json or a single other .json file"
    if not folder.is_dir():
        raise DataError(f"--manual_dir={folder}: found no such directory, expected one with {expected}")
    files = [folder / f"captions.{suffix}" for suffix in ("csv", "jsonl", "json")]
    files = [file for file in files if file.is_file()] or sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise bad_record(
            folder, "", "", ", ".join(file.name for file in files) or "no captions file", f"one of {expected}"
        )
    return files[0]


def _group(captions: list[CaptionRecord], ids: dict[str, int] | None, file: pathlib.Path) -> dict[str, _Image]:
    """Checks the captions and groups them by image.

    Args:
      captions: in the file's order.
      ids: {path: image id}, or None to number the images from 0.
      file: the file of captions.

    Returns:
      {path: image}, in the order of each image's first caption.

    Raises:
      DataError: a caption is empty, a split's name is bad or not the same for all captions of an image, or an image's
        file does not exist.
    """
    images: dict[str, _Image] = {}
    any_split = captions[0].split if captions else None
    for number, caption in enumerate(captions):
        if not caption.text.strip():
            raise bad_record(file, caption.where, "caption", shown(caption.text), "words")
        if (caption.split is None) != (any_split is None):
            raise bad_record(file, caption.where, "split", shown(caption.split), "a split in every record, or in none")
        if caption.split is not None and (not _SPLIT_NAME.fullmatch(caption.split) or caption.split == "all"):
            raise bad_record(
                file, caption.where, "split", shown(caption.split), "a name of letters, such as train or val"
            )
        image = images.get(caption.image)
        if image is None:
            image_path(file.parent, caption.image, file, caption.where, "image")
            image_id = len(images) if ids is None else ids[caption.image]
            image = images[caption.image] = _Image(caption.image, image_id, [], caption.split)
        if image.split != caption.split:
            expected = f"{quoted(image.split)}, the split of this image's other captions"
            raise bad_record(file, caption.where, "split", shown(caption.split), expected)
        image.captions.append((number, caption.text.strip()))
    return images


def _read_csv(text: str, file: pathlib.Path) -> tuple[list[CaptionRecord], None]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    captions = []
    try:
        header = next(rows, [])
        if not {"image", "caption"} <= set(header) <= set(COLUMNS) or len(set(header)) != len(header):
            raise bad_record(file, "line 1", "", shown(header), "the columns image, caption and, optionally, split")
        for row in rows:
            where = f"line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                expected = f"{len(header)}; quote text that contains commas"
                raise bad_record(file, where, "", f"{len(row)} values", expected)
            record = dict(zip(header, row, strict=True))
            captions.append(CaptionRecord(record["image"], record["caption"], record.get("split"), where))
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: not CSV: {error}") from error
    return captions, None


def _read_jsonl(text: str, file: pathlib.Path) -> tuple[list[CaptionRecord], None]:
    captions = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        record = _parse(line, f"{file}, {where}")
        image = read_field(record, "image", str, file, where)
        assert isinstance(record, dict)
        unknown = sorted(set(record) - set(LINE_KEYS))
        if unknown or ("caption" in record) == ("captions" in record):
            lacking = "" if unknown or "caption" in record else "caption"
            raise bad_record(
                file, where, lacking, f"the keys {listed(record)}", "image, caption or captions, and optionally split"
            )
        split = read_field(record, "split", str, file, where) if "split" in record else None
        if "caption" in record:
            texts = [read_field(record, "caption", str, file, where)]
        else:
            texts = read_field(record, "captions", list, file, where)
            if not texts or not all(isinstance(each, str) for each in texts):
                raise bad_record(file, where, "captions", shown(texts), "a list of one string or more")
            for each in texts:
                check_text(each, file, where, "captions")
        captions += [CaptionRecord(image, each, split, where) for each in texts]
    return captions, None


def _read_coco(text: str, file: pathlib.Path) -> tuple[list[CaptionRecord], dict[str, int]]:
    images = read_annotations(_parse(text, str(file)), file)
    captions = [
        CaptionRecord(name, caption, None, f"annotation {number}")
        for name, image in images.items()
        for number, caption in image.captions
    ]
    return captions, {name: image.image_id for name, image in images.items()}


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


_READERS: dict[str, Callable[[str, pathlib.Path], tuple[list[CaptionRecord], Any]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_coco,
}
