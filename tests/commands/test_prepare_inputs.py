"""`flaxcap prepare` with the user's own images, captions, features and weights, good and bad."""

import hashlib
import io
import json
import pathlib
import struct
import zlib
from dataclasses import replace

import h5py
import numpy as np
import pytest
from PIL import Image

from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, ConfigError, Data, Encoder, Shapes
from flaxcap.data.base import DataError
from flaxcap.encoders import base as encoders
from flaxcap.encoders.inception_v3 import network, weights
from flaxcap.features import extract
from flaxcap.features.shards import StoreError
from flaxcap.features.store import Store
from flaxcap.files.params import load_params
from flaxcap.images import decode
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import UNK, VocabularyError

RANDOM = Encoder(weights="random", block="mixed0", image_size=160, batch_size=8, shard_images=4)
WIDTH = 3


def random_image(seed: int = 0, mode: str = "RGB", size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def huge() -> bytes:
    """Returns a small PNG whose header says 60000x60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    header += struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + encoded(random_image(), "PNG")[33:]


SIXTEEN_BIT = Image.fromarray(np.random.default_rng(3).integers(0, 65536, (64, 64)).astype(np.uint16))
GOOD = {
    "plain.jpg": encoded(random_image(1), "JPEG"),
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


def write_folder(folder: pathlib.Path, splits: dict[str, dict[str, list[str]]], files: dict[str, bytes] | None = None):
    """Writes a folder data set.

    Args:
      folder: the directory.
      splits: {split: {image name: captions}}.
      files: the bytes of images by name; the others get those of a good image.
    """
    lines = []
    for split, images in splits.items():
        for name, captions in images.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((files or {}).get(name, GOOD["plain.jpg"]))
            lines.append(json.dumps({"image": name, "captions": captions, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def write_maps(folder: pathlib.Path, names, shape=lambda _: (8, 8, WIDTH)) -> pathlib.Path:
    for k, name in enumerate(names):
        file = folder / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.full(shape(k), k, np.float32))
    return folder


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


def imported(tmp_path, splits=None, shape=lambda _: (8, 8, WIDTH), **options) -> Store:
    """Prepares a folder data set with imported features, which is fast."""
    if splits is None:
        splits = {
            "train": {f"t{k}.jpg": [f"caption {k}{letter}" for letter in "abc"] for k in range(5)},
            "val": {f"v{k}.jpg": ["one", "two"] for k in range(3)},
            "test": {"x.jpg": ["alone"]},
        }
    folder = write_folder(tmp_path / "mine", splits)
    maps = write_maps(tmp_path / "npy", [name for names in splits.values() for name in names], shape)
    config = Config(dataset="folder", data=Data(**options))
    return prepare(config, tmp_path / "data", manual_dir=folder, npy_dir=maps)


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


# Imported features and weights


def test_features_are_imported_and_their_origin_recorded(tmp_path):
    found = imported(tmp_path)
    assert (found.positions, found.feature_dim, found.positions_vary) == (64, WIDTH, False)
    first = (tmp_path / "npy" / "t0.jpg.npy").read_bytes()
    assert found.manifest["encoder"]["weights_sha256"] == hashlib.sha256(first).hexdigest()
    assert found.manifest["encoder"]["imported_from"] == str(tmp_path / "npy")
    assert not (found.path / "encoder").exists()
    np.testing.assert_array_equal(found.split("val").read([0, 1, 2])[:, 5, 1].astype(int), [5, 6, 7])
    # A later prepare reads the same folder, with or without --npy_dir.
    (found.path / "val" / "shards" / "00000.json").unlink()
    (tmp_path / "npy" / "v1.jpg.npy").unlink()
    config = Config(dataset="folder")
    with pytest.raises(StoreError, match=r"npy/v1\.jpg\.npy: not found"):
        prepare(config, tmp_path / "data", manual_dir=tmp_path / "mine")
    write_maps(tmp_path / "npy", [*(["-"] * 6), "v1.jpg"])
    prepare(config, tmp_path / "data")
    assert found.split("val").unfinished() == []


@pytest.mark.parametrize("shape", [(36, WIDTH), (7, 7, WIDTH), (14, 14, WIDTH)])
def test_imported_maps_may_have_any_number_of_positions(tmp_path, shape):
    found = imported(tmp_path, shape=lambda _: shape)
    positions = int(np.prod(shape[:-1]))
    assert (found.positions, found.feature_dim, found.positions_vary) == (positions, WIDTH, False)
    feats_NPF = found.split("val").read([2, 0])
    assert feats_NPF.shape == (2, positions, WIDTH)
    assert (feats_NPF == np.array([7, 5])[:, None, None]).all()


def test_the_number_of_positions_may_vary_between_images(tmp_path):
    positions = {0: 10, 3: 100, 6: 37, 8: 11}  # by image; 50 elsewhere
    found = imported(tmp_path, shape=lambda k: (positions.get(k, 50), WIDTH))
    assert (found.positions, found.feature_dim, found.positions_vary) == (100, WIDTH, True)
    number = 0
    for role in found.roles:
        for feats_PF in found.split(role).read(range(found.split(role).images)).astype(float):
            used = positions.get(number, 50)
            assert feats_PF.shape == (100, WIDTH)
            assert (feats_PF[:used] == number).all()
            assert np.isnan(feats_PF[used:]).all()
            number += 1
    assert number == 9
    # A later prepare keeps the shape and refuses a map that does not fit it.
    (found.path / "val" / "shards" / "00000.json").unlink()
    np.save(tmp_path / "npy" / "v1.jpg.npy", np.ones((101, WIDTH), np.float32))
    with pytest.raises(StoreError, match=r"v1\.jpg\.npy: found 101 positions of 3 features, expected at most 100"):
        prepare(Config(dataset="folder"), tmp_path / "data")
    np.save(tmp_path / "npy" / "v1.jpg.npy", np.ones((1, WIDTH), np.float32))
    prepare(Config(dataset="folder"), tmp_path / "data")
    assert np.isnan(found.split("val").read([1]).astype(float)).sum() == 99 * WIDTH


def test_maps_are_compared_before_anything_is_imported(tmp_path):
    with pytest.raises(StoreError, match=r"npy/x\.jpg\.npy: found float32 \[0, 3\], expected floats \[P, F\] or"):
        imported(tmp_path, shape=lambda k: (0 if k == 8 else 64, WIDTH))
    assert not list((tmp_path / "data").rglob("zarr.json"))


def write_weights(file: pathlib.Path, seed: int) -> pathlib.Path:
    """Writes random weights up to mixed0 in the layout of Keras."""
    rng = np.random.default_rng(seed)
    with h5py.File(file, "w") as h5:
        for number, shape in enumerate(network.kernel_shapes("mixed0").values(), 1):
            spread = np.sqrt(2 / np.prod(shape[:3]))
            h5[f"conv2d_{number}/kernel:0"] = rng.normal(size=shape).astype(np.float32) * np.float32(spread)
            for name, value in (("beta", 0), ("moving_mean", 0), ("moving_variance", 1)):
                h5[f"batch_normalization_{number}/{name}:0"] = np.full(shape[-1], value, np.float32)
    return file


def test_weights_of_another_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "fetch", lambda *_: pytest.fail("a download"))
    one, other = (str(write_weights(tmp_path / f"{seed}.h5", seed)) for seed in (1, 2))
    folder = write_folder(tmp_path / "mine", {"train": {"t.jpg": ["one"]}, "val": {"v.jpg": ["two"]}})
    config = Config(dataset="folder", encoder=replace(RANDOM, weights="imagenet"))
    data_dir = tmp_path / "data"
    found = prepare(config, data_dir, manual_dir=folder, encoder_weights=one)
    _, digest = weights.load(one, block="mixed0")
    assert found.manifest["encoder"]["weights_sha256"] == digest
    with pytest.raises(
        StoreError, match=rf"made by weights {digest}, expected those of {other} .*delete it, or choose another"
    ):
        prepare(config, data_dir, manual_dir=folder, encoder_weights=other)
    by_preset = Config(dataset="folder", encoder=replace(RANDOM, weights=other))
    with pytest.raises(StoreError, match=rf"made by weights {digest}, expected those of {other}"):
        prepare(by_preset, data_dir, manual_dir=folder)
    for again in (one, None):  # the same file, or none
        assert prepare(config, data_dir, manual_dir=folder, encoder_weights=again).path == found.path


def test_encoder_options_that_contradict_each_other_are_refused(tmp_path):
    shapes = Data(shapes=Shapes(num_train=1, num_val=1, num_test=0))
    for spec, given in (("random", "some.h5"), ("imagenet", "random")):
        config = Config(dataset="shapes", data=shapes, encoder=replace(RANDOM, weights=spec))
        with pytest.raises(ConfigError, match=rf"--encoder_weights={given} with --config\.encoder\.weights={spec}"):
            prepare(config, tmp_path, encoder_weights=given)
    config = Config(dataset="shapes", data=shapes, encoder=replace(RANDOM, image_size=70))
    with pytest.raises(ConfigError, match=r"--config\.encoder\.image_size=70: .* at least 83x83 pixels"):
        prepare(config, tmp_path)
    config = Config(dataset="shapes", data=shapes, encoder=replace(RANDOM, weights=str(tmp_path / "no.h5")))
    with pytest.raises(encoders.WeightsError, match=r"no weights file at .*no\.h5"):
        prepare(config, tmp_path)
