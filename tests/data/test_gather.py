"""Records of a data set: names of files, missing images, what is dropped, and splits."""

import json
import os
import pathlib
import shutil
import unicodedata
import zipfile

import pytest
from coco_sample import id_of, write_coco_zips
from small_folder import all_captions, captions, coco, examples, write, write_images

from flaxcap.data import datasets
from flaxcap.data.base import DataError, Examples
from flaxcap.data.coco_captions import CocoCaptionsBuilder
from flaxcap.data.folder import FolderBuilder
from flaxcap.data.layouts.listing import Listing


def csv_of(*names: str) -> str:
    return "image,caption\n" + "".join(f"{name},x\n" for name in names)


@pytest.mark.parametrize(
    ("asked", "on_disk", "what"),
    [
        (unicodedata.normalize("NFC", "Füße.jpg"), unicodedata.normalize("NFD", "Füße.jpg"), "Unicode normalisation"),
        (unicodedata.normalize("NFD", "が/é.jpg"), unicodedata.normalize("NFC", "が/é.jpg"), "Unicode normalisation"),
        ("IMG_1.JPG", "img_1.jpg", "letter case"),
        ("img_1.jpg", "Photos/IMG_1.JPG", "letter case"),
        ("Sub/É.jpg", unicodedata.normalize("NFD", "images/sub/é.JPG"), "letter case"),
    ],
)
def test_names_that_differ_in_case_or_normalisation_are_found(tmp_path, caplog, asked, on_disk, what):
    folder = tmp_path / "in"
    write_images(folder, on_disk, "other.jpg")
    write(folder / "captions.csv", csv_of(asked, "other.jpg"))
    found = {e.filename: e.image for some in examples(folder).values() for e in some}
    assert found[asked] == (folder / on_disk).read_bytes()
    assert f"folder: image names that differ from their files' in {what}: 1; the first is " in caplog.text


def test_an_exact_name_is_preferred_and_an_ambiguous_one_refused(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "A.jpg", "images/B.jpg", "b.JPG")
    write(folder / "captions.csv", csv_of("A.jpg", "B.jpg"))
    found = {e.filename: e.image for some in examples(folder).values() for e in some}
    assert found["A.jpg"].endswith(b"A.jpg")
    assert found["B.jpg"].endswith(b"images/B.jpg")
    write(folder / "captions.csv", csv_of("A.JPG"))
    with pytest.raises(
        DataError, match=r"line 2, field 'image': found 'A\.JPG', expected the exact name of one of 'A\.jpg', 'a\.jpg'"
    ):
        captions(folder)


def test_two_spellings_of_a_file_are_one_image(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.jpg")
    write(folder / "captions.csv", "image,caption\na.jpg,one\n./A.jpg,two\nb.jpg,x\n")
    assert all_captions(folder) == {"a.jpg": ("one", "two"), "b.jpg": ("x",)}


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    write_images(tmp_path, *(f"images/{number}.jpg" for number in range(50)))
    listing = Listing(tmp_path)
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(os, "stat", None)
    for number in range(50):
        assert listing.find(f"{number}.jpg", (), tmp_path, "", "") == f"images/{number}.jpg"
    assert sorted(listed) == [tmp_path, tmp_path / "images"]


def test_missing_images_are_listed_together(tmp_path):
    folder = tmp_path / "in"
    names = [f"{number:02d}.jpg" for number in range(40)]
    write_images(folder, *names[:25], "images/30.png")
    write(folder / "captions.csv", csv_of(*names))
    with pytest.raises(DataError) as error:
        captions(folder)
    first, *lines = str(error.value).splitlines()
    assert "found no file for 15 of 40 images, more than --max_bad_fraction=0.05 allows (train lacks 1" in first
    assert first.endswith(f"expected image files in {folder}, in its images/:")
    assert len(lines) == 11
    assert lines[0] == f"  {folder}/captions.csv, line 27, field 'image': found '25.jpg'"
    assert f"  {folder}/captions.csv, line 32, field 'image': found '30.jpg' (there is 'images/30.png')" in lines
    assert lines[-1] == "  and 5 more"


def test_a_few_missing_images_become_examples_without_a_file(tmp_path, caplog):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "c.jpg")
    (folder / "dead.jpg").symlink_to("gone.jpg")
    rows = "image,caption,split\na.jpg,x,train\nb.jpg,y,train\nc.jpg,z,val\ndead.jpg,z,train\n"
    write(folder / "captions.csv", rows)
    with pytest.raises(DataError, match=r"2 of 4 images, more than --max_bad_fraction=0\.6 allows \(train lacks 2"):
        examples(folder, max_bad_fraction=0.6)
    found = examples(folder, max_bad_fraction=0.7)
    assert {e.filename: e.image for e in found["train"]} == {
        "a.jpg": (folder / "a.jpg").read_bytes(), "b.jpg": b"", "dead.jpg": b"",
    }  # fmt: skip
    assert "found no file for 2 of 4 images; they are skipped like unreadable ones: 'b.jpg', 'dead.jpg'" in caplog.text


def dirty_coco(names: list[str]) -> dict:
    """Returns annotations with one of each kind of record that is dropped."""
    tree = coco(names)
    tree["images"].append(tree["images"][0])
    tree["annotations"] += [
        {"image_id": 1, "caption": "no id"},
        {"id": None, "image_id": 1, "caption": "null"},
        {"id": 91, "image_id": 2, "caption": "  "},
    ]
    del tree["annotations"][2]
    return tree


def test_records_are_dropped_and_counted_in_one_line(tmp_path, caplog):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.jpg", "c.jpg")
    write(folder / "captions.json", dirty_coco(["a.jpg", "b.jpg", "c.jpg"]))
    assert all_captions(folder) == {"a.jpg": ("caption of a",), "b.jpg": ("caption of b",)}
    assert "folder: left out 1 duplicate image record, 2 annotations without an id, 1 empty caption\n" in caplog.text
    assert "folder: left out 1 image without a caption\n" in caplog.text


def test_a_repeated_image_under_another_id_is_one_image(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.jpg")
    tree = coco(["a.jpg", "b.jpg"])
    tree["images"].append({"id": 9, "file_name": "a.jpg"})
    tree["annotations"].append({"id": 90, "image_id": 9, "caption": "another"})
    write(folder / "captions.json", tree)
    assert all_captions(folder)["a.jpg"] == ("caption of a", "another")


def test_coco_captions_counts_as_a_folder_does(tmp_path, caplog):
    zips = tmp_path / "zips"
    zips.mkdir()
    write_coco_zips(zips)
    with zipfile.ZipFile(zips / "annotations_trainval2014.zip") as archive:
        trees = {name: json.loads(archive.read(name)) for name in archive.namelist()}
    tree = trees["annotations/captions_train2014.json"]
    tree["images"].append(tree["images"][0])
    del tree["annotations"][0]["id"]
    tree["annotations"][1]["caption"] = " "
    for record in tree["annotations"]:
        if record["image_id"] == id_of(0):
            record["caption"] = ""
    with zipfile.ZipFile(zips / "annotations_trainval2014.zip", "w") as archive:
        for name, tree in trees.items():
            archive.writestr(name, json.dumps(tree))
    builder = datasets.prepare("coco_captions", tmp_path / "data", manual_dir=zips)
    assert len(Examples(builder, "train")) == 5
    counts = "1 duplicate image record, 1 annotation without an id, 6 empty captions"
    assert f"coco_captions: left out {counts}\n" in caplog.text
    assert "coco_captions: left out 1 image without a caption\n" in caplog.text


def test_images_missing_from_cocos_zips_are_listed(tmp_path):
    zips = tmp_path / "zips"
    zips.mkdir()
    names = write_coco_zips(zips)
    with zipfile.ZipFile(zips / "train2014.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    gone = names["train"][2]
    del members[f"train2014/{gone}"]
    with zipfile.ZipFile(zips / "train2014.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    message = rf"found no file for 1 of 14 images.*in train2014\.zip.*\n  .*field 'file_name': found '{gone}'$"
    with pytest.raises(DataError, match=message):
        datasets.prepare("coco_captions", tmp_path / "data", manual_dir=zips)
    builder = datasets.prepare("coco_captions", tmp_path / "data", manual_dir=zips, max_bad_fraction=0.2)
    assert [e.filename for e in Examples(builder, "train") if not e.image] == [gone]


@pytest.mark.parametrize("header", ["image,caption", "image,caption,split"])
def test_a_data_set_with_a_train_split_only_is_split_by_a_hash(tmp_path, capsys, header):
    folder = tmp_path / "in"
    names = [f"{number}.jpg" for number in range(60)]
    write_images(folder, *names)
    split = ",Train" if "split" in header else ""
    write(folder / "captions.csv", header + "\n" + "".join(f"{name},x{split}\n" for name in names))
    found = captions(folder)
    counts = ", ".join(f"{len(some)} {split}" for split, some in found.items())
    assert set(found) == {"train", "val", "test"}
    why = "the captions name no split but train" if split else "the captions name no split"
    assert f"folder: {why}; a hash of each image's name made the splits: {counts}\n" in capsys.readouterr().out


def test_other_splits_are_not_split(tmp_path, capsys):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.jpg")
    write(folder / "captions.csv", "image,caption,split\na.jpg,x,train\nb.jpg,y,fold2\n")
    assert set(captions(folder)) == {"train", "fold2"}
    assert "hash" not in capsys.readouterr().out


def builder_of(folder: pathlib.Path) -> FolderBuilder:
    return FolderBuilder(manual_dir=folder, data_dir=folder.parent / "data", max_bad_fraction=0.5)


def test_files_are_all_that_the_data_set_reads(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "train2014/1.jpg", "val2014/1.jpg", "val2014/unused.jpg")
    for split in ("train", "val"):
        write(folder / "annotations" / f"captions_{split}2014.json", coco(["1.jpg", *["gone.jpg"] * (split == "val")]))
    index = ["annotations/captions_train2014.json", "annotations/captions_val2014.json"]
    missing = ["val2014/gone.jpg", "gone.jpg", "train2014/gone.jpg"]  # where it may appear
    expected = [*index, "train2014/1.jpg", "val2014/1.jpg", *missing]
    assert builder_of(folder).files() == [folder / name for name in expected]
    assert builder_of(folder).index() == [folder / name for name in index]
    shutil.rmtree(folder)
    write_images(folder, "a.jpg", "b.jpg", "sub/c.jpg")
    for text in ("b.txt", "a.txt", "sub/c.txt"):
        write(folder / text, "x")
    names = ["a.txt", "b.txt", "sub/c.txt", "a.jpg", "b.jpg", "sub/c.jpg"]
    found = builder_of(folder).files()
    assert sorted(found) == sorted(folder / name for name in names)
    assert builder_of(folder).files() == found
    write_coco_zips(tmp_path)
    zips = CocoCaptionsBuilder(manual_dir=tmp_path, data_dir=tmp_path / "data").files()
    assert set(zips) >= set(tmp_path.glob("*.zip"))
