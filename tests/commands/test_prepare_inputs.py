"""`flaxcap prepare` with the user's own images and captions, good and bad."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from prepared_folder import PLAIN, RANDOM, encoded, imported, random_image, write_folder

from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, Data
from flaxcap.data.base import DataError
from flaxcap.encoders import base as encoders
from flaxcap.features import extract
from flaxcap.features.shards import StoreError
from flaxcap.features.store import Store
from flaxcap.files.params import load_params
from flaxcap.images import decode
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import UNK, VocabularyError


def huge() -> bytes:
    """Returns a small PNG whose header says 60000x60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    header += struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + encoded(random_image(), "PNG")[33:]


SIXTEEN_BIT = Image.fromarray(np.random.default_rng(3).integers(0, 65536, (64, 64)).astype(np.uint16))
GOOD = {
    "plain.jpg": PLAIN,
    "cmyk.jpg": encoded(random_image(2, "CMYK"), "JPEG"),
    "grey.png": encoded(random_image(3, "L"), "PNG"),
    "sixteen.png": encoded(SIXTEEN_BIT, "PNG"),
    "moving.gif": encoded(random_image(4, "P"), "GIF", save_all=True, append_images=[random_image(5, "P")]),
    "sub/turned.jpg": encoded(
        random_image(6), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    ),
}
BAD = {
    "corrupt.jpg": (b"\xff\xd8 this is no JPEG", "not an image"),
    "empty.jpg": (b"", "the file is empty"),
    "huge.png": (huge(), "too many pixels"),
    "text.png": (b"<html>404</html>", "not an image"),
    "truncated.jpg": (GOOD["plain.jpg"][:1500], "damaged: "),
}


# Images


def test_bad_images_are_skipped_and_listed(tmp_path, capsys):
    files = GOOD | {name: data for name, (data, _) in BAD.items()}
    mixed = dict(sorted(files.items()))  # good and bad ones in turn
    splits = {
        "train": {name: [f"a picture {n}", "this is seen"] for n, name in enumerate(mixed)},
        "val": {"val.jpg": ["a picture of a zebra"]},
        "test": {"broken.jpg": ["nothing"], "test.jpg": ["an okapi", "a picture"]},
    }
    folder = write_folder(tmp_path / "mine", splits, mixed | {"broken.jpg": b""})
    config = Config(dataset="folder", encoder=RANDOM)
    data_dir = tmp_path / "data"
    with pytest.raises(extract.BadImagesError, match=r"of 11 images cannot be read, more than --max_bad") as error:
        prepare(config, data_dir, manual_dir=folder)
    assert "  corrupt.jpg: not an image" in str(error.value)
    found = prepare(config, data_dir, manual_dir=folder, max_bad_fraction=0.5)

    split = found.split("train")
    assert [row.filename for row in split.rows] == list(mixed)
    manifest = json.loads((found.path / "manifest.json").read_text())
    listed = {s["filename"]: s for s in manifest["splits"]["train"]["skipped"]}
    assert set(listed) == set(BAD)
    for name, (_, reason) in BAD.items():
        assert listed[name]["reason"].startswith(reason)
        assert split.rows[listed[name]["row"]].filename == name
    assert [s.filename for s in found.split("test").skipped()] == ["broken.jpg"]
    assert "train: 6 images with features, 5 skipped" in capsys.readouterr().out

    encoder = encoders.make(config.encoder)
    encode = extract.make_encode(encoder, load_params(found.path / "encoder"), config.encoder, many=False)
    pixels = np.stack([decode.to_square(GOOD[name], 160) for name in GOOD])
    expected = np.asarray(encode(np.concatenate([pixels, pixels[:2]])))[: len(GOOD)].astype(float)
    rows = [list(mixed).index(name) for name in GOOD]
    np.testing.assert_allclose(split.read(rows).astype(float), expected, rtol=0.02, atol=0.01)
    with pytest.raises(StoreError, match="holds no features"):
        split.read([listed["empty.jpg"]["row"]])

    # The vocabulary has the words of all training captions, also of unreadable images, and no others.
    vocabulary = Store.finished(data_dir, config).vocabulary()
    assert {"picture", "seen", "10"} <= set(vocabulary.ids)
    assert not {"zebra", "okapi"} & set(vocabulary.ids)
    tokens = Tokens.of([row.captions for row in found.split("val").rows], vocabulary, 50)
    assert tokens.ids.tolist().count(UNK) == 2
    assert vocabulary.decode(tokens.ids) == "a picture <unk> a <unk>"


def test_missing_images_count_with_unreadable_ones(tmp_path, capsys):
    names = [f"{number}.jpg" for number in range(6)]
    splits = {"train": {name: [f"a picture {name}"] for name in names}, "val": {"v.jpg": ["this is seen"]}}
    folder = write_folder(tmp_path / "mine", splits, {"1.jpg": b"no JPEG"})
    (folder / "4.jpg").unlink()
    config, data_dir = Config(dataset="folder", encoder=RANDOM), tmp_path / "data"
    with pytest.raises(DataError, match=r"found no file for 1 of 7 images, .* \(train lacks 1 of 6\)"):
        prepare(config, data_dir, manual_dir=folder, max_bad_fraction=0.1)
    # One of six is missing, and one unreadable: each alone is allowed, both are not.
    with pytest.raises(extract.BadImagesError, match=r"2 of 6 images cannot be read") as error:
        prepare(config, data_dir, manual_dir=folder, max_bad_fraction=0.2)
    assert "  4.jpg: the file is empty or missing" in str(error.value)
    found = prepare(config, data_dir, manual_dir=folder, max_bad_fraction=0.4)
    assert [s.filename for s in found.split("train").skipped()] == ["1.jpg", "4.jpg"]
    assert "train: 4 images with features, 2 skipped" in capsys.readouterr().out


def test_a_split_that_repeats_another_one_is_logged(tmp_path, caplog):
    train = {f"{number}.jpg": [f"a picture of {number} things"] for number in range(2)}
    folder = write_folder(tmp_path / "mine", {"train": train, "val": {"v.jpg": ["this is seen"]}})
    data = Data(val_split="train[:1]", test_split="")
    prepare(Config(dataset="folder", encoder=RANDOM, data=data), tmp_path / "data", manual_dir=folder)
    assert "val: 1 of its 1 images are in train too; the first is '0.jpg'" in caplog.text


def test_a_train_split_of_bad_images_only_is_refused(tmp_path):
    folder = write_folder(tmp_path / "mine", {"train": {"a.jpg": ["x"]}, "val": {"b.jpg": ["x"]}}, {"a.jpg": b""})
    config = Config(dataset="folder", encoder=RANDOM)
    with pytest.raises(StoreError, match="train: found no readable image, expected at least one"):
        prepare(config, tmp_path / "data", manual_dir=folder)


# Splits and limits


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"train": [3, 3, 3, 3, 3], "val": [2, 2, 2], "test": [1]}),
        ({"max_images": 2}, {"train": [3, 3], "val": [2, 2], "test": [1]}),
        ({"max_captions": 4}, {"train": [3, 1], "val": [2, 2], "test": [1]}),
        ({"max_captions": 6}, {"train": [3, 3], "val": [2, 2, 2], "test": [1]}),
        ({"max_captions": 1}, {"train": [1], "val": [1], "test": [1]}),
        ({"max_images": 1, "max_captions": 5}, {"train": [3], "val": [2], "test": [1]}),
        ({"test_split": ""}, {"train": [3, 3, 3, 3, 3], "val": [2, 2, 2]}),
        ({"train_split": "train+val", "val_split": "test", "test_split": "train[:1]"},
         {"train": [3, 3, 3, 3, 3, 2, 2, 2], "val": [1], "test": [3]}),
    ],
)  # fmt: skip
def test_limits_and_splits(tmp_path, options, expected):
    found = imported(tmp_path, **options)
    assert {role: [len(row.captions) for row in found.split(role).rows] for role in found.roles} == expected
    known = {word for word in found.vocabulary().ids if word[0].isdigit()}
    assert known == {
        word for row in found.split("train").rows for c in row.captions for word in c.split() if word[0].isdigit()
    }


def test_a_missing_test_split_is_left_out_with_a_warning(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        found = imported(tmp_path, {"train": {"t.jpg": ["one"]}, "val": {"v.jpg": ["two"]}})
    assert found.roles == ("train", "val")
    assert "no test split: " in caplog.text
    assert "train (1 images), val (1 images)" in caplog.text


@pytest.mark.parametrize("role", ["train", "val"])
def test_a_missing_train_or_val_split_is_an_error(tmp_path, role):
    splits = {"train": {"t.jpg": ["one"]}, "val": {"v.jpg": ["two"]}, "test": {"x.jpg": ["three"]}}
    del splits[role]
    with pytest.raises(DataError, match=rf"'{role}'.*(\n.*)*Existing splits: ") as error:
        imported(tmp_path, splits)
    assert "Unknown split" not in str(error.value)  # TFDS's words for it
    assert all(f"{other} (1 images)" in str(error.value) for other in splits)
    assert str(error.value).startswith(f"--config.data.{role}_split={role}: ")
    assert f"Set --config.data.{role}_split to one of these" in str(error.value)
    assert not list((tmp_path / "data" / "features").rglob("manifest.json"))


def test_training_captions_without_a_word_are_refused(tmp_path):
    with pytest.raises(VocabularyError, match="the training captions contain no word"):
        imported(tmp_path, {"train": {"t.jpg": ["?!", "…"]}, "val": {"v.jpg": ["two"]}})


def test_faults_of_captions_are_printed(tmp_path, capsys):
    splits = {"train": {"t.jpg": ["one two"]}, "val": {"v.jpg": ["two", "zzz ?", "qqq", "?!"]}}
    imported(tmp_path, splits, max_length=3)
    found = capsys.readouterr().out.splitlines()
    assert (
        "val: 1 of 4 (25%) captions contain no word, only punctuation or symbols; the first is '?!', of 'v.jpg'"
        in found
    )
    assert (
        "train: 1 of 1 (100%) captions are cut: they have more tokens than --config.data.max_length=3; the"
        " longest has 4"
    ) in found
    assert any(line.startswith("val: 2 of 3 (66.7%) words are not in the vocabulary, which has 2: ") for line in found)


def test_a_store_follows_its_captions_and_refuses_another_folder(tmp_path):
    imported(tmp_path)
    found = imported(tmp_path, {"train": {"t.jpg": ["other"]}, "val": {"v.jpg": ["other"]}})
    assert [row.filename for row in found.split("train").rows] == ["t.jpg"]
    assert "other" in found.vocabulary().ids
    assert float(found.split("val").read([0]).max()) == 1  # write_maps gives the second image ones
    (tmp_path / "mine").rename(tmp_path / "others")
    with pytest.raises(
        StoreError, match=rf"{found.path}: found features of folder/mine/1\.0\.0, expected those of folder/others/"
    ):
        prepare(Config(dataset="folder"), tmp_path / "data", manual_dir=tmp_path / "others", npy_dir=tmp_path / "npy")
