"""A store's path, and a split's shards: what is written is read, and damage raises."""

import copy
import pathlib
import resource

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.config import Config, Data, Encoder, Shapes
from flaxcap.encoders import base as encoders
from flaxcap.encoders.inception_v3.encoder import InceptionV3
from flaxcap.features import store
from flaxcap.features.shards import Skipped, Split, StoreError
from flaxcap.fields import flatten
from flaxcap.files import integrity
from flaxcap.files.integrity import WriteError

POSITIONS, WIDTH = 64, 3
IMAGES, SHARD = 7, 3  # shards of 3, 3 and 1


def features(images: int = IMAGES, dtype=ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(images, POSITIONS, WIDTH)).astype(dtype)


def write(split: Split, numbers=None, skipped=()) -> np.ndarray:
    """Writes the shards `numbers`, or the unfinished ones, and returns the features."""
    feats_NPF = features(split.images)
    array = split.create_array(POSITIONS, WIDTH, "bfloat16")
    for number in split.unfinished() if numbers is None else numbers:
        span = split.shard(number)
        split.write(array, number, feats_NPF[span.start : span.stop], [s for s in skipped if s.row in span])
    return feats_NPF


def shard_file(split: Split, number: int) -> pathlib.Path:
    return pathlib.Path(split.path) / "features" / "c" / str(number) / "0" / "0"


@pytest.fixture
def split(tmp_path) -> Split:
    return Split(epath.Path(tmp_path) / "train", IMAGES, SHARD)


# The path


def other(name, value):
    """Returns another valid value of a field."""
    if name in OTHERS:
        return OTHERS[name]
    return {bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 1}.get(
        type(value), lambda: f"{value}2"
    )()


def with_field(config: Config, name: str, value: object) -> Config:
    config = copy.deepcopy(config)
    *groups, field = name.split(".")
    node = config
    for group in groups:
        node = getattr(node, group)
    setattr(node, field, value)
    return config


DEPENDS = {
    *("dataset", "data.train_split", "data.val_split", "data.test_split", "data.max_images", "data.max_captions"),
    *("encoder.name", "encoder.block", "encoder.image_size", "encoder.dtype", "encoder.store_dtype"),
}
OTHERS = {"encoder.name": "other", "encoder.block": "mixed0", "encoder.image_size": 400}
RENDERED = {f"data.shapes.{name}" for name in ("num_train", "num_val", "num_test", "seed")}


@pytest.mark.parametrize(
    ("config", "depends"),
    [
        (Config(), DEPENDS),
        (Config(dataset="shapes"), DEPENDS | RENDERED),
        (Config(encoder=Encoder(weights="random")), DEPENDS | {"encoder.weights", "encoder.seed"}),
    ],
    ids=["pretrained", "shapes", "random"],
)
def test_the_path_depends_on_the_fields_that_the_features_depend_on(config, depends, monkeypatch):
    monkeypatch.setitem(encoders._ENCODERS, "other", InceptionV3)
    here = store.path_for("data", config)
    changes = {name for name, field in flatten(config).items()
               if store.path_for("data", with_field(config, name, other(name, field.value))) != here}  # fmt: skip
    assert changes == depends


def test_the_path_is_stable_and_readable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(dataset="shapes", data=Data(shapes=Shapes(num_train=5)), encoder=Encoder(weights="random"))
    path = store.path_for("~/d", config)
    assert path == store.path_for(tmp_path / "d", copy.deepcopy(config))
    assert path.parent == epath.Path(tmp_path) / "d" / "features"
    assert path.name.startswith("shapes-inception_v3-mixed10-random-")
    trained = [store.path_for("d", with_field(Config(), "encoder.weights", w)) for w in ("imagenet", "/some/file.h5")]
    assert trained[0] == trained[1]
    assert "coco_captions-inception_v3-mixed10-pretrained-" in str(trained[0])
    assert str(store.path_for("gs://bucket/d", config)).startswith("gs://bucket/d/features/shapes-")


# Writing and reading


def test_features_are_read_by_row(split):
    feats_NPF = write(split)
    again = Split(split.path, IMAGES, SHARD)
    for some in ([0], [6, 0, 3], [2, 2, 2], range(IMAGES), np.array([5, 1], np.int32)):
        found = again.read(some)
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, feats_NPF[np.asarray(some)])
    assert again.unfinished() == []
    assert sorted(str(p.relative_to(split.path)) for p in pathlib.Path(split.path).rglob("*") if p.is_file()) == [
        *(f"features/c/{number}/0/0" for number in range(3)),
        "features/zarr.json",
        *(f"shards/0000{number}.json" for number in range(3)),
    ]


@given(st.integers(1, 40), st.integers(1, 45))
def test_shards_hold_every_row_once_in_order(images, shard_rows):
    split = Split(epath.Path("nowhere"), images, shard_rows)
    spans = [split.shard(number) for number in range(split.num_shards)]
    assert [row for span in spans for row in span] == list(range(images))
    assert all(len(span) == shard_rows for span in spans[:-1])
    assert spans[-1]
    assert split.unfinished() == list(range(split.num_shards))


def test_float32_is_stored_exactly(split):
    feats_NPF = features(dtype=np.float32)
    array = split.create_array(POSITIONS, WIDTH, "float32")
    split.write(array, 1, feats_NPF[3:6], [])
    np.testing.assert_array_equal(split.read([4, 3]), feats_NPF[[4, 3]])
    assert store.bytes_an_image(POSITIONS, WIDTH, "float32") == feats_NPF[0].nbytes
    assert store.bytes_an_image(64, 2048, "bfloat16") == 262144


def test_finished_shards_and_skipped_images_are_on_disk(split):
    bad = [Skipped(1, "1.jpg", "the file is empty"), Skipped(6, "6.jpg", "damaged: “ü” \n")]
    assert (split.unfinished(), split.skipped()) == ([0, 1, 2], [])
    write(split, [1], bad)
    assert (split.unfinished(), split.skipped()) == ([0, 2], [])
    write(split, [2], bad)
    assert (split.unfinished(), split.skipped()) == ([0], bad[1:])
    write(split, [0], bad)
    again = Split(split.path, IMAGES, SHARD)
    assert (again.unfinished(), again.skipped()) == ([], bad)


def test_a_partly_written_record_is_ignored(split):
    write(split, [0, 2])
    for number, text in ((1, '{"skipped": ['), (0, "")):
        (split.path / "shards" / f".0000{number}.json.part").write_text(text)
    (split.path / "shards" / "notes.txt").write_text("mine")
    assert (split.unfinished(), split.skipped()) == ([1], [])
    write(split, [1])
    assert (split.unfinished(), split.skipped()) == ([], [])


@pytest.mark.parametrize("name", ["a b", "100%", "a%41b", "q?x", "h#y", "ünï 犬", "a|b", "c:d"])
def test_directory_names_may_hold_any_character(tmp_path, name):
    split = Split(epath.Path(tmp_path) / name / "train", IMAGES, SHARD)
    feats_NPF = write(split)
    np.testing.assert_array_equal(Split(split.path, IMAGES, SHARD).read([6]), feats_NPF[[6]])
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = Split(epath.Path("here"), IMAGES, SHARD)
    write(split)
    split.read([0])
    assert (tmp_path / "here" / "features" / "zarr.json").is_file()


# Missing rows and damage


def test_a_row_that_was_never_written_raises(split):
    with pytest.raises(StoreError, match=r"train/features: cannot be opened .*zarr\.json"):
        split.read([0])
    feats_NPF = write(split, [1])
    again = Split(split.path, IMAGES, SHARD)
    np.testing.assert_array_equal(again.read([3, 5]), feats_NPF[[3, 5]])
    with pytest.raises(StoreError, match="train/features: row 2 holds no features"):
        again.read([3, 2, 0])
    array = split.create_array(POSITIONS, WIDTH, "bfloat16")
    feats_NPF[6] = np.nan  # a skipped image
    split.write(array, 2, feats_NPF[6:], [Skipped(6, "6.jpg", "empty")])
    with pytest.raises(StoreError, match="row 6 holds no features"):
        again.read([6])


@pytest.mark.parametrize("row", [IMAGES, -1, 10**9])
def test_a_row_out_of_range_raises(split, row):
    write(split)
    with pytest.raises(StoreError, match=r"train/features: cannot be read \(OUT_OF_RANGE.*\d"):
        split.read([0, row])


@settings(max_examples=30)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_raises(tmp_path_factory, position, bit):
    split = Split(epath.Path(tmp_path_factory.mktemp("flip")), IMAGES, SHARD)
    write(split, [0])
    file = shard_file(split, 0)
    data = bytearray(file.read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"features: cannot be read \(DATA_LOSS: .*/c/0/0/0.*[Dd]igest"):
        Split(split.path, IMAGES, SHARD).read(range(SHARD))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_shard_raises(split, share):
    write(split)
    file = shard_file(split, 1)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(StoreError, match=r"features: cannot be read \(.*/c/1/0/0") as error:
        Split(split.path, IMAGES, SHARD).read([4])
    assert len(str(error.value)) < 550
    split.read([0, 6])  # the other shards are sound


def test_an_array_of_another_shape_or_dtype_is_not_opened(split):
    write(split)
    for other in (Split(split.path, IMAGES + 1, SHARD), Split(split.path, IMAGES, SHARD + 1)):
        with pytest.raises(StoreError, match=r"another kind \(FAILED_PRECONDITION: .*received"):
            other.create_array(POSITIONS, WIDTH, "bfloat16")
    for positions, width, dtype in (
        (POSITIONS + 1, WIDTH, "bfloat16"),
        (POSITIONS, WIDTH + 1, "bfloat16"),
        (POSITIONS, WIDTH, "float32"),
    ):
        with pytest.raises(StoreError, match="another kind"):
            split.create_array(positions, width, dtype)
    (split.path / "features" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="another kind"):
        split.create_array(POSITIONS, WIDTH, "bfloat16")
    with pytest.raises(StoreError, match="cannot be opened"):
        _ = Split(split.path, IMAGES, SHARD).array


@pytest.fixture
def small_files():
    """Returns a function that limits files to 4 KiB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_shard_that_cannot_be_written_stays_unfinished(tmp_path, small_files):
    split = Split(epath.Path(tmp_path), 21, 20)
    array = split.create_array(POSITIONS, WIDTH, "bfloat16")
    feats_NPF = features(21)
    small_files()
    with pytest.raises(StoreError, match=r"features: shard 0 cannot be written \(.*too large\)$"):
        split.write(array, 0, feats_NPF[:20], [])
    assert split.unfinished() == [0, 1]
    split.write(array, 1, feats_NPF[20:], [])  # small enough
    assert split.unfinished() == [0]


# Atomic writes


def test_a_failed_write_keeps_the_previous_file(tmp_path, small_files):
    file = epath.Path(tmp_path) / "new" / "notes.json"
    integrity.write_atomically(file, "first “ü”")
    integrity.write_atomically(file, "second")
    assert file.read_text() == "second"
    small_files()
    with pytest.raises(WriteError, match=r"notes\.json: cannot be written \(File too large\)"):
        integrity.write_atomically(file, "x" * 10_000)
    assert file.read_text() == "second"
    integrity.write_atomically(file, "third")
    assert [p.name for p in file.parent.iterdir()] == ["notes.json"]


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def cut_off(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        integrity.write_atomically(epath.Path(tmp_path) / "notes.json", "text")
    assert not (tmp_path / "notes.json").exists()
