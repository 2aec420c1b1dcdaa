"""The images of files, directories and addresses: which are captioned, and what is reported of the others."""

import io
import os

import numpy as np
import pytest
from PIL import Image, features
from torture_cases import images as torture_images

from flaxcap.images import formats
from flaxcap.images.decode import ImageError, to_square
from flaxcap.images.sources import ImageSources

NOT_AN_IMAGE = f"not an image (expected {', '.join(formats.FORMATS)})"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def encoded(format: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(out, format)
    return out.getvalue()


JPEG, PPM = encoded("JPEG"), encoded("PPM")


def reasons(found: ImageSources) -> dict[str, str]:
    return dict.fromkeys(map(os.path.basename, found.images), "") | {
        os.path.basename(name): reason for name, reason in found.failed
    }


def test_sources_keep_their_order_and_directories_are_sorted(tmp_path):
    for name in ("b.PNG", "a.png", "notes.txt", "c.jpeg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "folder.jpg").mkdir()
    url = "http://host/x y/ü.png?a=%20b"
    found = ImageSources([url, str(tmp_path), str(tmp_path / "notes.txt")])
    names = ["a.png", "b.PNG", "c.jpeg", "notes.txt"]
    assert found.images == [url, *(str(tmp_path / name) for name in names)]


def test_a_directory_gives_every_file_that_is_read_when_it_is_named(tmp_path):
    """By suffix, or by content: some programs write images without a suffix or with one of their own."""
    sound = torture_images.sound()
    names = [
        "x.jfif",
        "y.jpe",
        "z.pgm",
        "w.pbm",
        "v.apng",
        "u.dib",
        "t.mpo",
        "no_suffix",
        "s.jpg_large",
        "r.JPG",
        "q.pnm",
    ]
    files = dict.fromkeys(names, JPEG) | {"z.pgm": PPM, "w.pbm": PPM, "u.dib": sound["plain.bmp"]}
    files |= {f"{n}.unknown": data for n, data in enumerate(sound.values())}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = ImageSources([str(tmp_path)])
    assert found.images == [str(tmp_path / name) for name in sorted(files)]
    assert found.notes() == []


def test_suffixes_are_those_of_the_formats():
    found = formats.suffixes()
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= found
    assert {".ppm", ".pgm", ".pbm", ".pnm"} <= found
    assert not found & {".eps", ".pdf", ".ico", ".txt", ".svg"}
    assert (".avif" in found) == features.check("avif")


def test_skipped_files_are_counted_by_reason(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for name in ("README", "b.txt", "c.csv"):
        (tmp_path / name).write_text("BMW, Python, P1 and others")
    (tmp_path / "photo.heic").write_bytes(HEIC)
    os.mkfifo(tmp_path / "fifo.png")  # opening it would block forever
    found = ImageSources([str(tmp_path)])
    assert reasons(found) == {"a.jpg": ""}
    assert sorted(found.notes()) == [
        "skipped 1 file: HEIC, which Pillow cannot read; convert it to JPEG, for example with the package pillow-heif:"
        " 'photo.heic'",
        "skipped 1 file: neither a file nor a directory: 'fifo.png'",
        f"skipped 3 files: {NOT_AN_IMAGE}: 'README', 'b.txt', 'c.csv'",
    ]


def test_a_heic_file_that_is_named_is_refused_with_the_package_that_reads_it():
    message = r"found HEIC, which Pillow cannot read; .* pillow-heif \(expected JPEG, PNG"
    for data in (HEIC, HEIC.replace(b"ftypheic", b"ftypmif1"), HEIC.replace(b"heic", b"hevc")):
        with pytest.raises(ImageError, match=message):
            to_square(data, 8)


def test_subdirectories_are_mentioned_or_read(tmp_path):
    for name in ("b.jpg", "a/z.jpg", "c/d/e.jpg", "c/x.txt", "b.d/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG if name.endswith("jpg") else b"")
    (tmp_path / "c" / "back").symlink_to(tmp_path)
    flat = ImageSources([str(tmp_path)])
    assert reasons(flat) == {"b.jpg": ""}
    (note,) = flat.notes()
    assert note.startswith("3 subdirectories were not read: ")
    assert note.endswith("; --recursive reads them")
    deep = ImageSources([str(tmp_path)], recursive=True)
    expected = ["a/z.jpg", "b.d/f.jpg", "b.jpg", "c/d/e.jpg"]
    assert deep.images == [str(tmp_path / name) for name in expected]
    assert deep.notes() == ["skipped 1 file: a link to a directory: 'back'", f"skipped 1 file: {NOT_AN_IMAGE}: 'x.txt'"]


def test_a_dead_link_is_reported_and_other_files_are_found(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").symlink_to("gone.jpg")
    (tmp_path / "c.jpg").write_bytes(JPEG)
    (tmp_path / "d.jpg").symlink_to("a.jpg")
    in_directory = ImageSources([str(tmp_path)])
    by_name = ImageSources([str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")])
    for found in (in_directory, by_name):
        assert reasons(found) == {"a.jpg": "", "b.jpg": "a dead link: there is no gone.jpg", "c.jpg": "", "d.jpg": ""}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nothere", "no such file or directory, and not an http(s) address"),
        ("empty", "found no image in the directory, expected JPEG, "),
        ("here.png/x", "no such file"),
        ("x" * 5000, "no such file"),
        ("a\0b", "no such file"),
        ("fifo.png", "no such file"),
    ],
)
def test_a_source_that_cannot_be_read_has_a_reason_and_the_others_are_found(source, reason, tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "here.png").write_bytes(JPEG)
    path = str(tmp_path / source)
    found = ImageSources([path, str(tmp_path / "here.png")])
    (bad,) = found.failed
    assert bad.name == path
    assert bad.reason.startswith(reason)
    assert found.images == [str(tmp_path / "here.png")]


def test_the_home_of_an_unknown_user_is_not_found():
    (found,) = ImageSources(["~nobody-of-this-name/a.png"]).failed
    assert found == ("~nobody-of-this-name/a.png", "no such file or directory, and not an http(s) address")
