"""COCO 2014 captions in Karpathy's splits, read from the downloaded zips without unpacking them."""

import contextlib
import os
import pathlib
import posixpath
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums as tfds_checksums
from tensorflow_datasets.core.download import download_manager, downloader

from flaxcap.data import gather
from flaxcap.data.base import CaptionBuilder, DataError, example
from flaxcap.data.gather import CaptionedImage
from flaxcap.data.layouts import coco, karpathy
from flaxcap.data.layouts.record import Dropped, ImageRecord
from flaxcap.data.layouts.tables import parse
from flaxcap.data.records import bad_record, read_bytes
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


class CocoCaptionsBuilder(CaptionBuilder):
    """COCO 2014 captions in Karpathy's splits: train 82,783, restval 30,504, val 5,000 and test 5,000 images.

    The source is four zips: `train2014.zip`, `val2014.zip`, `annotations_trainval2014.zip` and
    `caption_datasets.zip`. A zip in `manual_dir` is read from there, and its checksum is not compared. The others
    are downloaded. In place of Karpathy's zip, `manual_dir` may hold its `dataset_coco.json`.

    Captions and image ids come from the annotations, splits from Karpathy's file. Empty captions, annotations without
    an id and repeated records of an image are dropped and counted, and so are images without a caption.

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
        members = {year: _members(files[f"{year}.zip"]) for year in YEARS}
        dropped = Dropped()
        annotated = {}
        for year in YEARS:
            annotated |= _annotated(files[ANNOTATIONS], year, dropped)
        records = list(_in_karpathys_order(files[KARPATHY], annotated, dropped))
        dropped["image{s} in no split"] += len(annotated) - len(records)

        def find(record: ImageRecord) -> str | None:
            (year,) = record.folders
            return f"{year}/{record.name}" if f"{year}/{record.name}" in members[year] else None

        images = gather.gather(records, find, dropped)
        missing = gather.check_missing(self.name, images, self.max_bad_fraction, "train2014.zip and val2014.zip")
        gather.report(self.name, images, dropped, missing)
        return {split: self._generate_examples(found, files) for split, found in images.items()}

    def _generate_examples(
        self, images: list[CaptionedImage], files: dict[str, pathlib.Path]
    ) -> Iterator[tuple[int, dict]]:
        with contextlib.ExitStack() as stack:
            archives = {year: stack.enter_context(_open(files[f"{year}.zip"])) for year in YEARS}
            first = 0
            for image in images:
                (year,) = image.record.folders
                file = _image_file(archives[year], image.location) if image.location else b""
                yield example(file, image.image_id, image.record.name, enumerate(image.captions, first))
                first += len(image.captions)

    def _by_hand(self, name: str) -> pathlib.Path | None:
        """Returns the file's path in `manual_dir`, if it is there."""
        names = [name, KARPATHY_JSON] if name == KARPATHY else [name]
        paths = [self.manual_dir / known for known in names] if self.manual_dir is not None else []
        return next((path for path in paths if path.is_file()), None)

    def _file(self, name: str, dl_manager) -> pathlib.Path:
        """Returns the file's path in `manual_dir`, or else downloads it; DataError if that fails."""
        if (by_hand := self._by_hand(name)) is not None:
            return by_hand
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


def _annotated(archive: pathlib.Path, year: str, dropped: Dropped) -> dict[str, ImageRecord]:
    """Returns {file name: record} of a year's annotations. The records have no split yet."""
    where, text = _read(archive, f"annotations/captions_{year}.json")
    records = {}
    for name, image in coco.read_annotations(parse(text, where), where, dropped).items():
        if posixpath.basename(name) != name:
            raise bad_record(where, image.where, "file_name", quoted(name), f"a file in {year}/")
        # In the order of their ids, as in Karpathy's file and in TFDS's coco_captions.
        captions = tuple(text for _, text in sorted(image.captions))
        file = pathlib.Path(where)
        records[name] = ImageRecord(name, captions, file, image.where, None, image.image_id, "file_name", (year,))
    return records


def _in_karpathys_order(
    path: pathlib.Path, annotated: Mapping[str, ImageRecord], dropped: Dropped
) -> Iterator[ImageRecord]:
    """Yields the images with their splits, in the order of Karpathy's file.

    Args:
      path: Karpathy's zip, or its `dataset_coco.json`.
      annotated: by file name, from the annotations.
      dropped: counts repeated records of an image.
    """
    file, text = _read(path, KARPATHY_JSON)
    tree = karpathy.load(text, file, without=("sentences", "raw"))
    for where, filename, split, _ in karpathy.images(tree, file, dropped):
        if split not in SPLITS:
            raise bad_record(file, where, "split", shown(split), "one of " + ", ".join(SPLITS))
        if filename not in annotated:
            raise bad_record(file, where, "filename", shown(filename), "an image of the COCO annotations")
        yield annotated[filename]._replace(split=split)


def _read(path: pathlib.Path, member: str) -> tuple[str, bytes]:
    """Reads a JSON file.

    Args:
      path: a zip, or the JSON file itself.
      member: the JSON file in the zip.

    Returns:
      The file's name, for messages, and its content.
    """
    if path.suffix == ".json":
        return str(path), read_bytes(path)
    with _open(path) as archive:
        name, data = f"{path}/{member}", _member(archive, member, size_limits.CAPTIONS)
    if len(data) > size_limits.CAPTIONS:
        raise DataError(f"{name}: found more than the {size_limits.CAPTIONS} bytes allowed")
    return name, data


def _open(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # Python 3.11's zipfile raises many kinds for damaged files, not BadZipFile alone
        raise DataError(f"{path}: not a complete zip file ({error}); delete it and download it again") from error


def _members(path: pathlib.Path) -> set[str]:
    with _open(path) as archive:
        return set(archive.namelist())


def _image_file(archive: zipfile.ZipFile, member: str) -> bytes:
    """Returns an image's file, at most one byte more than `size_limits.IMAGE`, see `records.read_image`."""
    return _member(archive, member, size_limits.IMAGE)


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
