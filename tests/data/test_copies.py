"""Prepared copies follow the user's files: a change is noticed, and a copy is never lost."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from flaxcap.data import copies, datasets
from flaxcap.data.base import DataError, Examples


def picture(file: pathlib.Path, shade: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 9, 3), shade, np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "pictures"
    rows = ["image,caption,split"]
    for k in range(6):
        picture(folder / f"{k}.png", 10 * k)
        rows.append(f"{k}.png,a shade of {k},{'train' if k < 4 else 'val'}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


def images(builder) -> dict[str, bytes]:
    return {e.filename: e.image for split in builder.info.splits for e in Examples(builder, split)}


@pytest.fixture
def data_dir(folder, tmp_path) -> pathlib.Path:
    datasets.prepare("folder", tmp_path / "data", manual_dir=folder)
    return tmp_path / "data"


def in_place(image: pathlib.Path) -> None:
    picture(image, 200)


def by_another_file(image: pathlib.Path) -> None:
    picture(image.parent / "new.png", 200)
    (image.parent / "new.png").replace(image)


@pytest.mark.parametrize("replace", [in_place, by_another_file])
@pytest.mark.parametrize("named", [True, False])
def test_a_replaced_image_is_read_again(folder, data_dir, replace, named, capsys):
    before = images(datasets.prepare("folder", data_dir))
    replace(folder / "3.png")
    builder = datasets.prepare("folder", data_dir, manual_dir=folder if named else None)
    after = images(builder)
    assert after["3.png"] == (folder / "3.png").read_bytes() != before["3.png"]
    assert {n: x for n, x in after.items() if n != "3.png"} == {n: x for n, x in before.items() if n != "3.png"}
    assert "folder: 1 files have changed ('3.png')" in capsys.readouterr().out
    datasets.prepare("folder", data_dir, manual_dir=folder)
    assert capsys.readouterr().out == ""
    assert not list(data_dir.glob(".*.replaced"))


def test_all_replaced_images_are_read_again(folder, data_dir):
    for k in range(6):
        picture(folder / f"{k}.png", 100 + k)
    found = images(datasets.prepare("folder", data_dir, manual_dir=folder))
    assert found == {f"{k}.png": (folder / f"{k}.png").read_bytes() for k in range(6)}


def test_a_touched_or_moved_folder_is_not_read_again(folder, data_dir, tmp_path, monkeypatch):
    for file in folder.iterdir():
        os.utime(file, ns=(7, 7))
    moved = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(folder, moved)
    monkeypatch.setattr(copies, "write", lambda *_: pytest.fail("the data set was read again"))
    datasets.prepare("folder", data_dir, manual_dir=folder)
    datasets.prepare("folder", data_dir, manual_dir=moved)
    shutil.rmtree(moved)
    datasets.prepare("folder", data_dir)


def test_a_copy_survives_a_failure(folder, data_dir):
    before = images(datasets.prepare("folder", data_dir))
    (folder / "captions.csv").write_text("image,caption\nnot-there.png,a caption\n")
    for _ in range(2):
        with pytest.raises(DataError, match="not-there"):
            datasets.prepare("folder", data_dir, manual_dir=folder)
    shutil.rmtree(folder)
    assert images(datasets.prepare("folder", data_dir)) == before


def test_a_copy_without_a_record_of_its_files_is_read_again(folder, data_dir, capsys):
    builder = datasets.prepare("folder", data_dir, manual_dir=folder)
    (pathlib.Path(builder.data_dir) / "sources.json").write_text("{}")
    again = datasets.prepare("folder", data_dir, manual_dir=folder)
    assert "the data set is read again" in capsys.readouterr().out
    assert len(copies.fingerprint(again)) == 64


def test_flickr8k_follows_its_split_files_and_images(tmp_path):
    source, data_dir = tmp_path / "flickr", tmp_path / "data"
    names = [f"{k}.jpg" for k in range(4)]
    for k, name in enumerate(names):
        picture(source / "Images" / name, 20 * k)
    (source / "Flickr8k.token.txt").write_text("".join(f"{name}#0\ta caption .\n" for name in names))
    (source / "Flickr_8k.trainImages.txt").write_text("0.jpg\n1.jpg\n")
    first = datasets.prepare("flickr8k", data_dir, manual_dir=source)
    assert {s: i.num_examples for s, i in first.info.splits.items()} == {"train": 1, "val": 1}, "by a hash"
    (source / "Flickr_8k.devImages.txt").write_text("2.jpg\n")
    second = datasets.prepare("flickr8k", data_dir, manual_dir=source)
    assert {s: i.num_examples for s, i in second.info.splits.items()} == {"train": 2, "val": 1}
    picture(source / "Images" / "2.jpg", 250)
    third = datasets.prepare("flickr8k", data_dir)
    assert images(third)["2.jpg"] == (source / "Images" / "2.jpg").read_bytes()


def test_a_missing_image_is_read_when_it_appears(folder, tmp_path):
    (folder / "3.png").rename(tmp_path / "3.png")
    copy = datasets.prepare("folder", tmp_path / "data", manual_dir=folder, max_bad_fraction=0.5)
    assert images(copy)["3.png"] == b""
    (tmp_path / "3.png").rename(folder / "3.png")
    assert images(datasets.prepare("folder", tmp_path / "data"))["3.png"] == (folder / "3.png").read_bytes()


def test_an_emptied_folder_leaves_the_copy(folder, data_dir):
    before = images(datasets.prepare("folder", data_dir))
    for file in folder.iterdir():
        file.unlink()
    assert images(datasets.prepare("folder", data_dir, manual_dir=folder)) == before
