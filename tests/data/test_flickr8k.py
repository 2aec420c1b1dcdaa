"""flickr8k: small files in its layout, and the real ones if FLAXCAP_TEST_PHOTOS names them."""

import io
import pathlib
import shutil

import pytest
from PIL import Image

from flaxcap.data import datasets
from flaxcap.data.base import DataError, Examples

STRAY = "2258277193_586949ec62.jpg.1"


def jpeg(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (20, 16), grey).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Six images, their captions, and the original's stray entry. Train has c and b, dev a, test d."""
    folder = tmp_path / "flickr"
    (folder / "Images").mkdir(parents=True)
    for grey, name in enumerate("abcdef"):
        (folder / "Images" / f"{name}.jpg").write_bytes(jpeg(40 * grey))
    lines = [f"{name}.jpg#{k}\tPicture {name} , caption {k} ." for name in "fbcade" for k in range(2)]
    lines.insert(4, f"{STRAY}#0\tA stray .")
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, names in (("train", "cb"), ("dev", "a"), ("test", "d")):
        text = "".join(f"{name}.jpg\n" for name in names)
        (folder / f"Flickr_8k.{split}Images.txt").write_text(text)
    return folder


def replace(file: pathlib.Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def assert_fails(folder: pathlib.Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        datasets.prepare("flickr8k", folder.parent / "data", manual_dir=folder)
    assert not list((folder.parent / "data").glob("flickr8k/*"))


def test_splits_captions_and_ids(folder, tmp_path):
    builder = datasets.prepare("flickr8k", tmp_path / "data", manual_dir=folder)
    found = {split: list(Examples(builder, split)) for split in ("train", "val", "test")}
    # The ids in the token file: f 0, b 1, the stray entry 2, c 3, a 4, d 5, e 6.
    assert {split: [(e.image_id, e.filename) for e in all_of] for split, all_of in found.items()} == {
        "train": [(3, "c.jpg"), (1, "b.jpg")],
        "val": [(4, "a.jpg")],
        "test": [(5, "d.jpg")],
    }
    assert found["train"][0].captions == ("Picture c , caption 0 .", "Picture c , caption 1 .")
    assert found["train"][0].image == jpeg(80)
    again = datasets.prepare("flickr8k", tmp_path / "data")
    assert list(Examples(again, "test")) == found["test"]


def test_the_original_names_and_line_ends(folder, tmp_path):
    (folder / "Images").rename(folder / "Flicker8k_Dataset")
    (folder / "Flickr_8k.testImages.txt").unlink()
    for file in folder.glob("*.txt"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    builder = datasets.prepare("flickr8k", tmp_path / "data", manual_dir=folder)
    assert Examples(builder, "train")[1].captions[1] == "Picture b , caption 1 ."
    with pytest.raises(DataError, match=r"train \(2 images\), val \(1 images\)"):
        Examples(builder, "test")


def test_empty_captions_are_dropped(folder, tmp_path):
    tokens = folder / "Flickr8k.token.txt"
    replace(tokens, "b.jpg#0\tPicture b , caption 0 .", "b.jpg#0\t ")
    replace(tokens, "a.jpg#0\tPicture a , caption 0 .", "a.jpg#0\t")
    replace(tokens, "a.jpg#1\tPicture a , caption 1 .", "a.jpg#1\t")
    builder = datasets.prepare("flickr8k", tmp_path / "data", manual_dir=folder)
    assert Examples(builder, "train")[1].captions == ("Picture b , caption 1 .",)
    assert list(builder.info.splits) == ["train", "test"]


def test_an_image_without_captions_is_left_out_and_counted(folder, tmp_path, caplog):
    replace(folder / "Flickr_8k.trainImages.txt", "b.jpg", "g.jpg")
    builder = datasets.prepare("flickr8k", tmp_path / "data", manual_dir=folder)
    assert [example.filename for example in Examples(builder, "train")] == ["c.jpg"]
    assert "flickr8k: left out 7 captions of images in no split" in caplog.text
    assert "flickr8k: left out 1 image without a caption" in caplog.text


def test_a_damaged_image_is_kept_for_the_extraction_to_count(folder, tmp_path):
    (folder / "Images" / "c.jpg").write_bytes(b"")
    (folder / "Images" / "b.jpg").write_bytes(jpeg(40)[:100])
    builder = datasets.prepare("flickr8k", tmp_path / "data", manual_dir=folder)
    assert [example.image for example in Examples(builder, "train")] == [b"", jpeg(40)[:100]]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "Flickr8k.token.txt",
            "b.jpg#1\t",
            "b.jpg#1 ",
            r"token\.txt, line 4: found \"b\.jpg#1 Picture b .*a tab",
        ),
        ("Flickr8k.token.txt", "c.jpg#0\t", "c.jpg\t", r"token\.txt, line 6: found \"c\.jpg\\tPicture"),
        (
            "Flickr_8k.devImages.txt",
            "a.jpg",
            "c.jpg",
            r"devImages\.txt, line 1: found 'c\.jpg', which is in .*train",
        ),
        (
            "Flickr_8k.trainImages.txt",
            "b.jpg",
            "c.jpg",
            r"trainImages\.txt, line 2: found 'c\.jpg', which is in",
        ),
        (
            "Flickr_8k.testImages.txt",
            "d.jpg",
            STRAY,
            rf"lacks 1 of 1\); .*in .*flickr, in its Images/:\n  .*testImages\.txt, line 1: found '{STRAY}'$",
        ),
    ],
)
def test_the_error_of_a_bad_line_names_it(folder, file, old, new, message):
    replace(folder / file, old, new)
    assert_fails(folder, message)


def test_names_cannot_lead_out_of_the_folder(folder):
    replace(folder / "Flickr8k.token.txt", "e.jpg#0", "../Flickr8k.token.txt#0")
    replace(folder / "Flickr_8k.testImages.txt", "d.jpg", "../Flickr8k.token.txt")
    assert_fails(folder, r"testImages\.txt, line 1: found '\.\./Flickr8k\.token\.txt', expected a path inside")


def test_the_error_of_a_missing_file_names_it(folder):
    for name, message in (
        ("Images/b.jpg", r"found no file for 1 of 4 images.*\n  .*trainImages\.txt, line 2: found 'b\.jpg'$"),
        ("Flickr_8k.trainImages.txt", r"trainImages\.txt: cannot be read: No such file"),
        ("Flickr8k.token.txt", r"flickr: found no captions file, expected one of the authors' Flickr8k\.token\.txt, "),
    ):
        (folder / name).unlink()
        assert_fails(folder, message)
    shutil.rmtree(folder)
    assert_fails(folder, "--manual_dir=.*flickr: found no such directory")
    with pytest.raises(DataError, match=r"^--manual_dir: found none, expected the directory .* Flickr8k\.token"):
        datasets.prepare("flickr8k", folder.parent / "data")


def test_the_error_of_bytes_that_are_not_utf8_names_them(folder):
    file = folder / "Flickr8k.token.txt"
    file.write_bytes(file.read_bytes().replace(b"b , caption 1", b"b \xe9 caption 1"))
    assert_fails(folder, r"token\.txt, line 4: found the byte 0xe9, expected UTF-8")


def test_real_photographs(flickr_dir, tmp_path):
    """Prepares the first images of each split; all of them would be a copy of 200 MB."""
    folder = tmp_path / "flickr"
    folder.mkdir()
    (folder / "Images").symlink_to(flickr_dir / "Images")
    shutil.copy(flickr_dir / "Flickr8k.token.txt", folder)
    for split, count in (("train", 30), ("dev", 10)):
        names = (flickr_dir / f"Flickr_8k.{split}Images.txt").read_text().split()[:count]
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names))
    builder = datasets.prepare("flickr8k", tmp_path / "data", manual_dir=folder)
    found = [*Examples(builder, "train"), *Examples(builder, "val")]
    assert len(found) == 40
    assert len({example.image_id for example in found}) == 40
    for example in found:
        assert example.image == (flickr_dir / "Images" / example.filename).read_bytes()
        assert len(example.captions) == 5
        assert all(caption == caption.strip() != "" for caption in example.captions)
