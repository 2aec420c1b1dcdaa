"""COCO 2014 captions with Karpathy's splits, read out of the zips as they are downloaded."""

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

# {file: (bytes, SHA-256)}, as TFDS's own coco_captions has them.
CHECKSUMS: dict[str, tuple[int, str]] = {
    "train2014.zip": (13510573713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    "val2014.zip": (6645013297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    ANNOTATIONS: (252872794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    KARPATHY: (36745453, "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"),
}


class Annotated(NamedTuple):
    """An image of a COCO annotations file."""

    image_id: int
    captions: list[tuple[int, str]]  # (id, text), in the file's order; empty ones too


class _Image(NamedTuple):
    filename: str
    year: str
    image_id: int
    captions: list[tuple[int, str]]


class CocoCaptionsBuilder(CaptionBuilder):
    """COCO 2014 captions in Karpathy's splits: train 82,783, restval 30,504, val 5,000 and test 5,000 images.

    Takes each of `train2014.zip`, `val2014.zip`, `annotations_trainval2014.zip` and `caption_datasets.zip`
    (or its `dataset_coco.json` alone) from `manual_dir` where it is there, without a checksum, and downloads
    the others. Captions and ids are those of the annotations, splits those of Karpathy's file. An empty
    caption is dropped, and an image that has no other.

    Args:
      base_url: where `zips/` and `annotations/` are.
      karpathy_url: where Karpathy's zip is.
      checksums: {file name: (size in bytes, SHA-256)} that downloads must have.
      **kwargs: as for CaptionBuilder.
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
        # Not TFDS's variant "2014", which promises `objects` to those who share this data_dir.
        super().__init__(variant="2014-captions", **kwargs)

    @property
    def url_infos(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What TFDS's download manager holds a download against: {URL: size and SHA-256}."""
        return {
            self.urls[name]: tfds_checksums.UrlInfo(tfds_checksums.utils.Size(size), sha256, name)
            for name, (size, sha256) in self._checksums.items()
        }

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        files = {name: self._file(name, dl_manager) for name in self.urls}
        images: dict[str, _Image] = {}
        for year in YEARS:
            members = _members(files[f"{year}.zip"])
            where, tree = _load(files[ANNOTATIONS], f"annotations/captions_{year}.json")
            for filename, annotated in read_annotations(tree, where).items():
                if f"{year}/{filename}" not in members or posixpath.basename(filename) != filename:
                    zipped = f"{quoted(filename)}, which is not in {files[f'{year}.zip']}"
                    raise bad_record(
                        where, f"image {annotated.image_id}", "file_name", zipped, f"a file in its {year}/"
                    )
                # By their ids, as Karpathy's file and TFDS's builder have them.
                captions = sorted((number, text) for number, text in annotated.captions if text.strip())
                images[filename] = _Image(filename, year, annotated.image_id, captions)
        splits = _read_karpathy(files[KARPATHY], images)
        return {split: self._generate_examples(found, files) for split, found in splits.items()}

    def _generate_examples(self, images: list[_Image], files: dict[str, pathlib.Path]) -> Iterator[tuple[int, dict]]:
        with contextlib.ExitStack() as stack:
            archives = {year: stack.enter_context(_open(files[f"{year}.zip"])) for year in YEARS}
            for image in images:
                if image.captions:
                    file = _picture(archives[image.year], image)
                    yield example(file, image.image_id, image.filename, image.captions)

    def _file(self, name: str, dl_manager) -> pathlib.Path:
        """The file from `manual_dir`, or else downloaded; DataError where neither can be had."""
        by_hand = [name, KARPATHY_JSON] if name == KARPATHY else [name]
        if self.manual_dir is not None:
            for path in (self.manual_dir / known for known in by_hand):
                if path.is_file():
                    return path
        try:
            with _few_retries():
                return pathlib.Path(os.fspath(dl_manager.download(self.urls[name])))
        except download_manager.NonMatchingChecksumError as error:
            raise DataError(f"{name}: the download is not the expected file. {error}") from error
        except (OSError, tfds.download.DownloadError) as error:  # OSError is the base of requests' exceptions
            there = f"the directory given as --manual_dir (now {self.manual_dir or 'none'})"
            raise DataError(
                f"{name}: could not be downloaded from {self.urls[name]}: {error}\n"
                f"Fetch it by hand and put it as {name} into {there}."
            ) from error


def read_annotations(tree: object, file: object) -> dict[str, Annotated]:
    """{file name: image} of a parsed COCO captions file, in its order; an image may come without captions.

    Args:
      tree: the JSON tree, with "images" (id, file_name) and "annotations" (id, image_id, caption).
      file: its name, for messages.

    Raises DataError for a missing key, a wrong type, an id or file name given twice, a caption of no image.
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
    seen: set[int] = set()
    for index, record in enumerate(read_field(tree, "annotations", list, file, "")):
        where = f"annotations[{index}]"
        number, image_id = (read_field(record, key, int, file, where) for key in ("id", "image_id"))
        if number in seen:
            raise bad_record(file, where, "id", f"{number} a second time", "an id of its own")
        if image_id not in by_id:
            raise bad_record(file, where, "image_id", str(image_id), "the id of one of the images")
        seen.add(number)
        by_id[image_id].captions.append((number, read_field(record, "caption", str, file, where)))
    return by_name


def _read_karpathy(path: pathlib.Path, images: Mapping[str, _Image]) -> dict[str, list[_Image]]:
    """The images of each split, in the order of Karpathy's file, which is `path` or in the zip `path`."""
    # Its tokens would take gigabytes as Python objects; they are dropped while it is parsed.
    wanted = ("images", "filename", "split")
    file, tree = _load(path, KARPATHY_JSON, lambda record: {key: record[key] for key in wanted if key in record})
    splits: dict[str, list[_Image]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for index, record in enumerate(read_field(tree, "images", list, file, "")):
        where = f"images[{index}]"
        filename = read_field(record, "filename", str, file, where)
        split = read_field(record, "split", str, file, where)
        if split not in splits:
            raise bad_record(file, where, "split", shown(split), "one of " + ", ".join(SPLITS))
        if filename not in images:
            raise bad_record(file, where, "filename", shown(filename), "an image of the COCO annotations")
        if filename in seen:
            raise bad_record(file, where, "filename", f"{quoted(filename)} a second time", "each image once")
        seen.add(filename)
        splits[split].append(images[filename])
    return splits


def _load(path: pathlib.Path, member: str, hook: Callable[[dict], Any] | None = None) -> tuple[str, object]:
    """The name for messages and the tree of a JSON file: the zip's member, or `path` itself if it is JSON."""
    if path.suffix == ".json":
        name, data = str(path), read_bytes(path)
    else:
        with _open(path) as archive:
            name, data = f"{path}/{member}", _member(archive, member, size_limits.CAPTIONS)
            if len(data) > size_limits.CAPTIONS:
                raise DataError(f"{name}: has more than the {size_limits.CAPTIONS} bytes allowed")
    try:
        return name, json.loads(data, object_hook=hook)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: is not JSON in UTF-8: {error}") from error


def _open(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # for damaged files zipfile raises many kinds
        raise DataError(f"{path}: is not a whole zip file ({error}); delete it and fetch it anew") from error


def _members(path: pathlib.Path) -> set[str]:
    with _open(path) as archive:
        return set(archive.namelist())


def _picture(archive: zipfile.ZipFile, image: _Image) -> bytes:
    """Of a picture larger than `size_limits.IMAGE` a byte more than that, which decoding then refuses."""
    return _member(archive, f"{image.year}/{image.filename}", size_limits.IMAGE)


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A file of the archive by its exact name, or the first `most` + 1 bytes of a larger one.

    What is read to its end is checked against its CRC. Nothing is unpacked to disk.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        there = [other for other in archive.namelist()[:5] if posixpath.basename(other)]
        raise bad_record(archive.filename, "", "", f"no {plain(name)} in it (but {listed(there)}, ...)", "it") from None
    try:
        with archive.open(info) as file:
            return file.read(min(info.file_size, most) + 1)
    except Exception as error:  # for damaged files zipfile raises many kinds
        raise DataError(f"{archive.filename}/{plain(name)}: is damaged ({error}); fetch the zip anew") from error


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """TFDS tries ten times at doubling pauses: without a network, for more than three minutes."""
    before, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 3
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before
