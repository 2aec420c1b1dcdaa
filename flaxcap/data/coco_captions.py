"""COCO 2014 captions in Karpathy's splits, read from the downloaded zips without unpacking them."""

import contextlib
import json
import os
import pathlib
import posixpath
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums as tfds_checksums
from tensorflow_datasets.core.download import download_manager, downloader

from flaxcap.data.base import CaptionBuilder, DataError, example
from flaxcap.data.records import bad_record, read_bytes, read_field
from flaxcap.errors import listed, plain, quoted, shown
from flaxcap.files import size_limits

BASE_URL = "http://images.cocodataset.org"
KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
ANNOTATIONS, KARPATHY = "annotations_trainval2014.zip", "caption_datasets.zip"
KARPATHY_JSON = "dataset_coco.json"
YEARS = ("train2014", "val2014")
SPLITS = ("train", "restval", "val", "test")

# {file: (bytes, SHA-256)}, from the checksums of TFDS's own coco_captions.
CHECKSUMS: dict[str, tuple[int, str]] = {
    "train2014.zip": (13510573713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    "val2014.zip": (6645013297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    ANNOTATIONS: (252872794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    KARPATHY: (36745453, "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"),
}


class Annotated(NamedTuple):
    """An image of a COCO annotations file."""

    image_id: int
    captions: list[tuple[int, str]]  # (id, text), in the file's order, with the empty ones


class _Image(NamedTuple):
    filename: str
    year: str
    image_id: int
    captions: list[tuple[int, str]]


class CocoCaptionsBuilder(CaptionBuilder):
    """COCO 2014 captions in Karpathy's splits: train 82,783, restval 30,504, val 5,000 and test 5,000 images.

    The source is four zips: `train2014.zip`, `val2014.zip`, `annotations_trainval2014.zip` and
    `caption_datasets.zip`. A zip in `manual_dir` is read from there, and its checksum is not compared. The others
    are downloaded. In place of Karpathy's zip, `manual_dir` may hold its `dataset_coco.json`.

    Captions and ids come from the annotations, splits from Karpathy's file. Empty captions are dropped, and so
    are images without another caption.

    Args:
      base_url: the server's address of `zips/` and `annotations/`.
      karpathy_url: the address of Karpathy's zip.
      checksums: {file name: (size in bytes, SHA-256)} of the downloads.
      **kwargs: those of CaptionBuilder.
    """

    name = "coco_captions"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        base_url: str = BASE_URL,
        karpathy_url: str = KARPATHY_URL,
        checksums: Mapping[str, tuple[int, str]] = CHECKSUMS,
        **kwargs,
    ):
        self.urls = {f"{year}.zip": f"{base_url}/zips/{year}.zip" for year in YEARS}
        self.urls |= {ANNOTATIONS: f"{base_url}/annotations/{ANNOTATIONS}", KARPATHY: karpathy_url}
        self._checksums = checksums
        # Not TFDS's variant "2014": its readers in the same data_dir expect the feature `objects`.
        super().__init__(variant="2014-captions", **kwargs)

    @property
    def url_infos(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """{URL: size and SHA-256}, with which TFDS's download manager compares a download."""
        return {
            self.urls[name]: tfds_checksums.UrlInfo(tfds_checksums.utils.Size(size), sha256, name)
            for name, (size, sha256) in self._checksums.items()
        }

    def files(self) -> list[pathlib.Path]:
        assert self.manual_dir is not None
        return [self.manual_dir / name for name in (*self.urls, KARPATHY_JSON)]

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        files = {name: self._file(name, dl_manager) for name in self.urls}
        images: dict[str, _Image] = {}
        for year in YEARS:
            members = _members(files[f"{year}.zip"])
            where, tree = _load(files[ANNOTATIONS], f"annotations/captions_{year}.json")
            for filename, annotated in read_annotations(tree, where).items():
                if f"{year}/{filename}" not in members or posixpath.basename(filename) != filename:
                    absent = f"{quoted(filename)}, which is not in {files[f'{year}.zip']}"
                    raise bad_record(
                        where, f"image {annotated.image_id}", "file_name", absent, f"a file in its {year}/"
                    )
                # In the order of their ids, as in Karpathy's file and in TFDS's coco_captions.
                captions = sorted((number, text) for number, text in annotated.captions if text.strip())
                images[filename] = _Image(filename, year, annotated.image_id, captions)
        splits = _read_karpathy(files[KARPATHY], images)
        return {split: self._generate_examples(found, files) for split, found in splits.items()}

    def _generate_examples(self, images: list[_Image], files: dict[str, pathlib.Path]) -> Iterator[tuple[int, dict]]:
        with contextlib.ExitStack() as stack:
            archives = {year: stack.enter_context(_open(files[f"{year}.zip"])) for year in YEARS}
            for image in images:
                if image.captions:
                    file = _image_file(archives[image.year], image)
                    yield example(file, image.image_id, image.filename, image.captions)

    def _file(self, name: str, dl_manager) -> pathlib.Path:
        """Returns the file's path in `manual_dir`, or else downloads it; DataError if that fails."""
        by_hand = [name, KARPATHY_JSON] if name == KARPATHY else [name]
        if self.manual_dir is not None:
            for path in (self.manual_dir / known for known in by_hand):
                if path.is_file():
                    return path
        try:
            with _few_retries():
                return pathlib.Path(os.fspath(dl_manager.download(self.urls[name])))
        except download_manager.NonMatchingChecksumError as error:
            raise DataError(f"{name}: found a download with another checksum; {error}") from error
        except (OSError, tfds.download.DownloadError) as error:  # OSError is the base of requests' exceptions
            raise DataError(
                f"{name}: cannot be downloaded from {self.urls[name]}: {error}\n"
                f"Download it by hand, as {name}, into the directory that --manual_dir names"
                f" (now {self.manual_dir or 'none'})."
            ) from error


def read_annotations(tree: object, file: object) -> dict[str, Annotated]:
    """Returns {file name: image} of a COCO captions file, in its order. An image may have no captions.

    Args:
      tree: the parsed JSON, with "images" (id, file_name) and "annotations" (id, image_id, caption).
      file: the file's name, for messages.

    Raises:
      DataError: a field is missing or of another type, an id or file name is repeated, or a caption's image is
        not in the file.
    """
    by_name: dict[str, Annotated] = {}
    by_id: dict[int, Annotated] = {}
    for index, record in enumerate(read_field(tree, "images", list, file, "")):
        where = f"images[{index}]"
        image = Annotated(read_field(record, "id", int, file, where), [])
        name = read_field(record, "file_name", str, file, where)
        if image.image_id in by_id:
            raise bad_record(file, where, "id", f"{image.image_id} a second time", "an id of its own")
        if name in by_name:
            raise bad_record(file, where, "file_name", f"{quoted(name)} a second time", "a file name of its own")
        by_id[image.image_id] = by_name[name] = image
    caption_ids: set[int] = set()
    for index, record in enumerate(read_field(tree, "annotations", list, file, "")):
        where = f"annotations[{index}]"
        number, image_id = (read_field(record, key, int, file, where) for key in ("id", "image_id"))
        if number in caption_ids:
            raise bad_record(file, where, "id", f"{number} a second time", "an id of its own")
        if image_id not in by_id:
            raise bad_record(file, where, "image_id", str(image_id), "the id of one of the images")
        caption_ids.add(number)
        by_id[image_id].captions.append((number, read_field(record, "caption", str, file, where)))
    return by_name


def _read_karpathy(path: pathlib.Path, images: Mapping[str, _Image]) -> dict[str, list[_Image]]:
    """Returns the images of each split, in the order of Karpathy's file.

    Args:
      path: Karpathy's zip, or its `dataset_coco.json`.
      images: by file name, from the annotations.
    """
    # As Python objects, the file's tokens take gigabytes: they are dropped during parsing.
    wanted = ("images", "filename", "split")
    file, tree = _load(path, KARPATHY_JSON, lambda record: {key: record[key] for key in wanted if key in record})
    splits: dict[str, list[_Image]] = {split: [] for split in SPLITS}
    assigned: set[str] = set()
    for index, record in enumerate(read_field(tree, "images", list, file, "")):
        where = f"images[{index}]"
        filename = read_field(record, "filename", str, file, where)
        split = read_field(record, "split", str, file, where)
        if split not in splits:
            raise bad_record(file, where, "split", shown(split), "one of " + ", ".join(SPLITS))
        if filename not in images:
            raise bad_record(file, where, "filename", shown(filename), "an image of the COCO annotations")
        if filename in assigned:
            raise bad_record(file, where, "filename", f"{quoted(filename)} a second time", "each image once")
        assigned.add(filename)
        splits[split].append(images[filename])
    return splits


def _load(path: pathlib.Path, member: str, hook: Callable[[dict], Any] | None = None) -> tuple[str, object]:
    """Parses a JSON file.

    Args:
      path: a zip, or the JSON file itself.
      member: the JSON file in the zip.
      hook: `json.loads`'s `object_hook`.

    Returns:
      The file's name, for messages, and the parsed JSON.
    """
    if path.suffix == ".json":
        name, data = str(path), read_bytes(path)
    else:
        with _open(path) as archive:
            name, data = f"{path}/{member}", _member(archive, member, size_limits.CAPTIONS)
            if len(data) > size_limits.CAPTIONS:
                raise DataError(f"{name}: found more than the {size_limits.CAPTIONS} bytes allowed")
    try:
        return name, json.loads(data, object_hook=hook)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON in UTF-8: {error}") from error


def _open(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # Python 3.11's zipfile raises many kinds for damaged files, not BadZipFile alone
        raise DataError(f"{path}: not a complete zip file ({error}); delete it and download it again") from error


def _members(path: pathlib.Path) -> set[str]:
    with _open(path) as archive:
        return set(archive.namelist())


def _image_file(archive: zipfile.ZipFile, image: _Image) -> bytes:
    """Returns an image's file, at most one byte more than `size_limits.IMAGE`, see `records.read_image`."""
    return _member(archive, f"{image.year}/{image.filename}", size_limits.IMAGE)


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Returns a file of the archive, or the first `most` + 1 bytes of a larger one.

    zipfile compares the CRC of a file that is read to its end. Nothing is unpacked to disk.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        existing = [other for other in archive.namelist()[:5] if posixpath.basename(other)]
        found = f"no {plain(name)} in it, only {listed(existing)}, …"
        raise bad_record(archive.filename, "", "", found, "this file") from None
    try:
        with archive.open(info) as file:
            return file.read(min(info.file_size, most) + 1)
    except Exception as error:  # Python 3.11's zipfile raises many kinds for damaged files, not BadZipFile alone
        raise DataError(f"{archive.filename}/{plain(name)}: damaged ({error}); download the zip again") from error


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Limits the attempts at a download to three.

    TFDS 4.9 makes ten with doubling pauses, which takes more than three minutes without a network.
    """
    before, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 3
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before
