"""folder: three kinds of captions file, and the errors of each."""

import csv
import io
import json
import pathlib
import shutil

import pytest
from PIL import Image

from flaxcap.data import datasets
from flaxcap.data.base import DataError, Example, Examples

IMAGES = ["a.jpg", "b.png", "deep/c d.webp", "é.jpg"]
CAPTIONS = {
    "b.png": ["Two dogs, running", 'A "dog" runs'],
    "a.jpg": ["Ein Haus am Fluß"],
    "deep/c d.webp": ["one\nline", "another"],
    "é.jpg": ["Ein Café"],
}


def encoded(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (25 * len(name), 80, 120)).save(
        file, {"jpg": "JPEG"}.get(name[-3:], name.split(".")[-1])
    )
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "my pictures"
    for name in IMAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(name))
    return folder


def write_csv(folder: pathlib.Path, rows: list, header=("image", "caption")) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_jsonl(folder: pathlib.Path, records: list) -> None:
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def coco_tree() -> dict:
    return {
        "images": [{"id": 100 + k, "file_name": name} for k, name in enumerate(CAPTIONS)],
        "annotations": [
            {"id": 10 * k + n, "image_id": 100 + k, "caption": text}
            for k, texts in enumerate(CAPTIONS.values())
            for n, text in enumerate(texts)
        ],
    }


def everything(builder) -> dict[str, Example]:
    return {example.filename: example for split in builder.info.splits for example in Examples(builder, split)}


def assert_fails(folder: pathlib.Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        datasets.prepare("folder", folder.parent / "data", manual_dir=folder)
    assert not list((folder.parent / "data").glob("folder/*/*"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl by caption", "json", "other json"])
def test_each_kind_of_captions_file(folder, tmp_path, kind):
    rows = [(name, text) for name, texts in CAPTIONS.items() for text in texts]
    ids = range(4)
    if kind == "csv":
        write_csv(folder, rows)
    elif kind == "jsonl":
        write_jsonl(folder, [{"image": name, "captions": texts} for name, texts in CAPTIONS.items()])
    elif kind == "jsonl by caption":
        write_jsonl(folder, [{"caption": text, "image": name} for name, text in rows])
    else:
        name = "captions.json" if kind == "json" else "instances_mine.json"
        (folder / name).write_text(json.dumps(coco_tree() | {"info": {}, "licenses": []}))
        ids = range(100, 104)
    found = everything(datasets.prepare("folder", tmp_path / "data", manual_dir=folder))
    assert {name: list(example.captions) for name, example in found.items()} == CAPTIONS
    assert {name: example.image_id for name, example in found.items()} == dict(zip(CAPTIONS, ids, strict=True))
    for name in IMAGES:
        assert found[name].image == encoded(name)


def test_splits_of_the_file_are_used(folder, tmp_path):
    rows = [
        ("a.jpg", "one", "dev"),
        ("b.png", "two", "train"),
        ("é.jpg", "three", "train"),
        ("a.jpg", "four", "dev"),
    ]
    write_csv(folder, rows, ("image", "caption", "split"))
    builder = datasets.prepare("folder", tmp_path / "csv", manual_dir=folder)
    assert [e.filename for e in Examples(builder, "train")] == ["b.png", "é.jpg"]
    assert [e.captions for e in Examples(builder, "val")] == [("one", "four")]
    (folder / "captions.csv").unlink()
    write_jsonl(folder, [{"image": name, "caption": text, "split": split} for name, text, split in rows])
    other = datasets.prepare("folder", tmp_path / "jsonl", manual_dir=folder)
    assert everything(other) == everything(builder)


def test_changed_captions_are_prepared_again(folder, tmp_path):
    data_dir = tmp_path / "data"
    write_csv(folder, [("a.jpg", "before"), ("b.png", "same")])
    first = datasets.prepare("folder", data_dir, manual_dir=folder)
    assert first.builder_config is not None
    assert first.builder_config.name == "my_pictures"
    assert datasets.prepare("folder", data_dir, manual_dir=folder).data_dir == first.data_dir
    assert datasets.prepare("folder", data_dir).data_dir == first.data_dir, "the only prepared folder"
    write_csv(folder, [("a.jpg", "after"), ("b.png", "same")])
    second = datasets.prepare("folder", data_dir, manual_dir=folder)
    assert everything(second)["a.jpg"].captions == ("after",)
    shutil.copytree(folder, tmp_path / "others")
    datasets.prepare("folder", data_dir, manual_dir=tmp_path / "others")
    with pytest.raises(DataError, match=r"^--manual_dir: found none, .*; prepared copies: .*/folder/.*, .*/folder/"):
        datasets.prepare("folder", data_dir)
    with pytest.raises(DataError, match="prepared copies: none"):
        datasets.prepare("folder", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"captions\.csv, line 1: found \[\], expected the columns image, caption"),
        ("image,caption\n", r"captions\.csv: found no captions, expected at least one"),
        (
            "image,caption,colour\na.jpg,x,red\n",
            r"line 1: found \[\"image\", \"caption\", \"colour\"\], expected the col",
        ),
        ("image;caption\na.jpg;x\n", r"line 1: found \[\"image;caption\"\]"),
        ("image,caption,caption\na.jpg,x,y\n", r"line 1: found .*expected the columns"),
        ("caption,image\nx,a.jpg\ntwo, three,b.png\n", r"line 3: found 3 values, expected 2; quote"),
        ("image,caption,split\na.jpg,x,val\na.jpg,x, y,val\n", r"line 3: found 4 values, expected 3; quote"),
        ('image,caption\na.jpg,"x\ny"\nz.jpg,x\n', r"captions\.csv, line 4, field 'image': found 'z\.jpg'"),
        ('image,caption\na.jpg,"x\n', r"captions\.csv, line 2: not CSV: unexpected end of data"),
        ("image,caption\na.jpg,  \n", r"captions\.csv: found no captions, expected at least one"),
        (
            "image,caption\n../my pictures/a.jpg,x\n",
            r"field 'image': found '\.\./my pictures/a\.jpg', expected a path in",
        ),
        ("image,caption\n/etc/passwd,x\n", r"field 'image': found '/etc/passwd', expected a path inside"),
        ("image,caption\ndeep,x\n", r"field 'image': found 'deep'$"),
        ("image,caption\n,x\n", r"line 2, field 'image': found ''"),
        ("image,caption,split\na.jpg,x,\n", r"line 2, field 'split': found \"\", expected a name"),
        ("image,caption,split\na.jpg,x,all\n", r"line 2, field 'split': found \"all\", expected a name"),
        (
            "image,caption,split\na.jpg,x,../up\n",
            r"line 2, field 'split': found \"\.\./up\", expected a name",
        ),
        (
            "image,caption,split\na.jpg,x,val\na.jpg,y,train\n",
            r"line 3, field 'split': found \"train\", expected 'val'",
        ),
    ],
)
def test_bad_csv(folder, text, message):
    (folder / "captions.csv").write_text(text)
    assert_fails(folder, message)


def test_a_byte_order_mark_is_not_part_of_a_column(folder, tmp_path):
    (folder / "captions.csv").write_bytes("\ufeffimage,caption\r\na.jpg,x\r\n".encode())
    assert everything(datasets.prepare("folder", tmp_path, manual_dir=folder))["a.jpg"].captions == ("x",)


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "captions.json"])
def test_the_error_of_bytes_that_are_not_utf8_names_them(folder, name):
    (folder / name).write_bytes(b"image,caption\na.jpg,caf\xe9\n")
    assert_fails(folder, rf"{name}, line 2: found the byte 0xe9, expected UTF-8")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"captions\.jsonl, line 2: not JSON"),
        (7, r"line 2: found 7, expected an object"),
        ({"caption": "x"}, r"line 2, field 'image': found none, only 'caption', expected a string"),
        ({"image": 1, "caption": "x"}, r"line 2, field 'image': found 1, expected a string"),
        ({"image": "a.jpg"}, r"line 2, field 'caption': found the keys 'image', expected image, caption or captions"),
        (
            {"image": "a.jpg", "caption": "x", "captions": ["y"]},
            r"line 2: found the keys 'image', 'caption', 'cap",
        ),
        ({"image": "a.jpg", "text": "x"}, r"line 2: found the keys 'image', 'text', expected"),
        (
            {"image": "a.jpg", "caption": ["x"]},
            r"line 2, field 'caption': found \[\"x\"\], expected a string",
        ),
        ({"image": "a.jpg", "captions": "x"}, r"line 2, field 'captions': found \"x\", expected a list"),
        (
            {"image": "a.jpg", "captions": ["x", 2]},
            r"line 2, field 'captions': found \[\"x\", 2\], expected a list",
        ),
        (
            {"image": "a.jpg", "caption": "x", "split": None},
            r"line 2, field 'split': found null, expected a string",
        ),
        (
            {"image": "a.jpg", "caption": "x", "split": "val"},
            r"line 2, field 'split': found \"val\", expected a split in",
        ),
    ],
)
def test_bad_jsonl(folder, record, message):
    line = record if isinstance(record, str) else json.dumps(record)
    (folder / "captions.jsonl").write_text('{"image": "b.png", "caption": "fine"}\n' + line + "\n")
    assert_fails(folder, message)


def test_bad_coco_annotations(folder):
    file = folder / "captions.json"
    for change, message in (
        (
            lambda tree: tree["images"][1].update(id=100),
            r"captions\.json, images\[1\], field 'id': found 100 a second",
        ),
        (
            lambda tree: tree["annotations"][1].update(id=0),
            r"annotations\[1\], field 'id': found 0 a second time",
        ),
        (
            lambda tree: tree["annotations"][1].update(image_id=5),
            r"found 5, expected the id of one of the images",
        ),
        (
            lambda tree: tree["annotations"][1].update(id=True),
            r"field 'id': found true, expected a whole number",
        ),
        (
            lambda tree: tree["images"][0].update(file_name="no.jpg"),
            r"images\[0\], field 'file_name': found 'no\.jpg'",
        ),
        (lambda tree: tree.update(images={}), r"captions\.json, field 'images': found {}, expected a list"),
        (
            lambda tree: tree.update(annotations=[]),
            r"captions\.json: found no captions, expected at least one",
        ),
    ):
        tree = coco_tree()
        change(tree)
        file.write_text(json.dumps(tree))
        assert_fails(folder, message)
    file.write_text("[1]")
    assert_fails(folder, r"captions\.json: found \[1\], expected an object")


def test_an_image_without_annotation_is_left_out(folder, tmp_path):
    tree = coco_tree()
    tree["annotations"] = [record for record in tree["annotations"] if record["image_id"] != 101]
    (folder / "captions.json").write_text(json.dumps(tree))
    found = everything(datasets.prepare("folder", tmp_path, manual_dir=folder))
    assert sorted(found) == sorted(set(CAPTIONS) - {"a.jpg"})


def test_the_captions_file_must_be_unambiguous(folder):
    assert_fails(folder, r"my pictures: found no captions file, expected one of captions\.csv, .* \(docs/data\.md")
    (folder / "one.json").write_text("{}")
    (folder / "two.json").write_text("{}")
    assert_fails(folder, r"found 2 layouts: another \.json \(one\.json\); another \.json \(two\.json\), expected")
    write_csv(folder, [("a.jpg", "x")])
    write_jsonl(folder, [])
    assert_fails(
        folder,
        r"2 layouts: captions\.csv \(captions\.csv\); captions\.jsonl \(captions\.jsonl\), expected files of one",
    )
    with pytest.raises(DataError, match=r"--manual_dir=.*gone: found no such directory"):
        datasets.prepare("folder", folder.parent, manual_dir=folder / "gone")
