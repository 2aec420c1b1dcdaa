"""COCO's archives from untrusted sources: nothing is unpacked to disk, and sizes are limited."""

import json
import pathlib
import zipfile

import pytest
from torture_cases import files as torture_files

from flaxcap.data import datasets
from flaxcap.data.base import DataError, Examples
from flaxcap.data.coco_captions import CocoCaptionsBuilder
from flaxcap.files import size_limits
from flaxcap.images import decode


@pytest.fixture
def coco(tmp_path) -> pathlib.Path:
    """COCO's four zips, small, for tests that change them."""
    torture_files.write_files(
        tmp_path / "coco", {name: torture_files.coco_zip(name) for name in torture_files.COCO_ZIPS}
    )
    return tmp_path / "coco"


def rewrite(path: pathlib.Path, **changes: bytes) -> None:
    """Adds members to a zip, or changes their contents. Names may contain / and dots."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | changes).items():
            archive.writestr(name, content)


def images_of(builder) -> dict[str, bytes]:
    return {e.filename: e.image for split in builder.info.splits for e in Examples(builder, split)}


def test_paths_in_an_archive_are_not_followed(coco, tmp_path):
    """No member is written to disk under its own name."""
    outside = {"../../escaped": b"x", "/escaped": b"x", "train2014/../../escaped": b"x"}
    rewrite(coco / "train2014.zip", **outside)
    before = {p for p in tmp_path.parent.rglob("*") if p.name == "escaped"}
    assert len(images_of(datasets.prepare("coco_captions", tmp_path / "data", manual_dir=coco))) == 4
    assert {p for p in tmp_path.parent.rglob("*") if "escaped" in p.name} == before == set()
    assert not pathlib.Path("/escaped").exists()
    name = "annotations/captions_train2014.json"
    with zipfile.ZipFile(coco / "annotations_trainval2014.zip") as archive:
        tree = json.loads(archive.read(name))
    tree["images"][0]["file_name"] = "../../escaped"
    rewrite(coco / "annotations_trainval2014.zip", **{name: json.dumps(tree).encode()})
    with pytest.raises(DataError, match=r"captions_train2014\.json, images\[0\], field 'file_name': found '\.\./"):
        datasets.prepare("coco_captions", tmp_path / "other", manual_dir=coco)


def test_a_packed_image_that_is_too_large_is_cut_and_later_refused(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "IMAGE", 50_000)
    rewrite(coco / "val2014.zip", **{"val2014/val2014_0.jpg": bytes(1 << 24)})
    found = images_of(datasets.prepare("coco_captions", tmp_path / "data", manual_dir=coco))
    assert len(found["val2014_0.jpg"]) == 50_001
    with pytest.raises(decode.ImageError, match="more than the 50000 bytes allowed"):
        decode.to_square(found["val2014_0.jpg"], 299)
    monkeypatch.setattr(size_limits, "CAPTIONS", 100)
    with pytest.raises(DataError, match=r"annotations_trainval2014\.zip/.*: found more than the 100 bytes allowed"):
        datasets.prepare("coco_captions", tmp_path / "other", manual_dir=coco)


@pytest.mark.parametrize("name", torture_files.COCO_ZIPS)
def test_damaged_archives_are_read_or_named(coco, name):
    content, refused = (coco / name).read_bytes(), 0
    for damaged in torture_files.broken_copies(content, 40, seed=1):
        (coco / name).write_bytes(damaged)
        try:
            builder = CocoCaptionsBuilder(manual_dir=coco, data_dir=coco / "data")
            for examples in builder._split_generators(None).values():  # pyright: ignore[reportArgumentType]
                list(examples)
        except DataError as error:
            assert str(coco) in str(error), error  # noqa: PT017
            refused += 1
    assert refused > 10
