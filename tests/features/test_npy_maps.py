"""Imported feature maps: any number of positions is accepted, and unusable files are named."""

import pathlib

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.features import extract, npy_maps
from flaxcap.features.npy_maps import FeatureShape
from flaxcap.features.shards import Row, Split, StoreError, write_rows

POSITIONS, WIDTH = 64, 3
NAMES = ("0.jpg", "sub/0.jpg", "b.c.png")


def feature_maps() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(len(NAMES), POSITIONS, WIDTH)).astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A folder with maps of both forms, [P, F] and [Y, X, F]."""
    folder = tmp_path / "npy"
    shapes = ((POSITIONS, WIDTH), (8, 8, WIDTH), (1, POSITIONS, WIDTH))
    for name, feats, shape in zip(NAMES, feature_maps(), shapes, strict=True):
        file = folder / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, feats.reshape(shape))
    return folder


def run(tmp_path: pathlib.Path, folder: pathlib.Path, dtype: str = "float32") -> np.ndarray:
    """Imports the maps as `flaxcap prepare` does, and returns what the store holds."""
    split = Split(epath.Path(tmp_path) / f"train-{dtype}", len(NAMES), 2)
    write_rows(split.path, [Row(k, name, ("a",)) for k, name in enumerate(NAMES)])
    extract.extract(
        split,
        split.create_array(POSITIONS, WIDTH, dtype),
        npy_maps.loader(epath.Path(folder), split, FeatureShape(POSITIONS, WIDTH)),
        np.asarray,
        batch_size=2,
        at_once=2,
        num_workers=1,
        max_bad_fraction=0,
        name="npy",
    )
    return split.read(range(len(NAMES)))


def test_maps_of_both_forms_are_imported(tmp_path, folder):
    np.testing.assert_array_equal(run(tmp_path, folder), feature_maps())
    rounded = run(tmp_path, folder, "bfloat16")
    np.testing.assert_array_equal(rounded, feature_maps().astype(ml_dtypes.bfloat16))


def test_images_of_one_name_in_two_folders_have_their_own_maps(tmp_path, folder):
    (folder / "sub" / "0.jpg.npy").unlink()
    with pytest.raises(StoreError, match=r"npy/sub/0\.jpg\.npy: not found"):
        run(tmp_path, folder)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((POSITIONS, WIDTH + 1), np.float32),
            "found 64 positions of 4 features, expected 64 positions of 3 features$",
        ),
        (np.zeros((7, 8, WIDTH), np.float32), "found 56 positions of 3 features, expected 64 positions of 3 features$"),
        (
            np.zeros((WIDTH, POSITIONS), np.float32),
            "found 3 positions of 64 features, expected 64 positions of 3 features$",
        ),
        (np.zeros(POSITIONS * WIDTH, np.float32), r"found float32 \[192\], expected floats \[P, F\] or \[Y, X, F\]"),
        (np.zeros((1, 8, 8, WIDTH), np.float32), r"found float32 \[1, 8, 8, 3\]"),
        (np.zeros((0, WIDTH), np.float32), r"found float32 \[0, 3\], .* of at least one position$"),
        (np.zeros((POSITIONS, 0), np.float32), r"found float32 \[64, 0\]"),
        (np.zeros((), np.float32), r"found float32 \[\]"),
        (np.zeros((POSITIONS, WIDTH), np.int32), r"found int32 \[64, 3\]"),
        (np.full((POSITIONS, WIDTH), "x"), r"found <U1 \[64, 3\]"),
        (np.full((POSITIONS, WIDTH), np.nan, np.float32), "found numbers that are not finite"),
        (np.full((POSITIONS, WIDTH), {"a": 1}), r"found object \[64, 3\]"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, folder, array, message):
    np.save(folder / "b.c.png.npy", array)
    with pytest.raises(StoreError, match=rf"npy/b\.c\.png\.npy: {message}"):
        run(tmp_path, folder)


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("trap-was-sprung"),)


def test_a_pickle_is_never_loaded(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(folder / "0.jpg.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(StoreError, match=r"0\.jpg\.npy: found object \[1\], expected floats"):
        run(tmp_path, folder)
    (folder / "0.jpg.npy").write_bytes(np.array([Trap()], object).dumps())
    with pytest.raises(StoreError, match=r"0\.jpg\.npy: not a NumPy array"):
        run(tmp_path, folder)
    assert not pathlib.Path("trap-was-sprung").exists()


@settings(max_examples=60)
@given(st.binary(max_size=40) | st.integers(0, 700), st.data())
def test_a_damaged_file_is_named(tmp_path_factory, damage, data):
    folder = tmp_path_factory.mktemp("npy")
    file = folder / "0.jpg.npy"
    np.save(file, feature_maps()[0])
    sound = file.read_bytes()
    assert np.array_equal(npy_maps.read_npy(epath.Path(folder), "0.jpg"), feature_maps()[0])
    if isinstance(damage, int):  # truncated, or with another header
        file.write_bytes(sound[:damage] if data.draw(st.booleans()) else b"?" * (damage % 100 + 1) + sound)
    else:
        file.write_bytes(damage)
    with pytest.raises(StoreError, match=r"/0\.jpg\.npy: not a NumPy array"):
        npy_maps.read_npy(epath.Path(folder), "0.jpg")


def test_an_archive_of_arrays_is_not_an_array(tmp_path, folder):
    with (folder / "0.jpg.npy").open("wb") as file:
        np.savez(file, feature_maps()[0])
    with pytest.raises(StoreError, match="not a NumPy array"):
        run(tmp_path, folder)


def test_a_file_shorter_than_its_header_says_is_refused(tmp_path, folder):
    with (folder / "0.jpg.npy").open("wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (10**15, WIDTH)})
    message = r"0\.jpg\.npy: not a NumPy array \(found 0 bytes, expected 12000000000000000\)"
    with pytest.raises(StoreError, match=message):
        run(tmp_path, folder)
    with pytest.raises(StoreError, match=message):
        npy_maps.find_shape(epath.Path(folder), NAMES)


# Any number of positions


def save(folder: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> epath.Path:
    """Writes maps of these shapes by image name."""
    for name, shape in shapes.items():
        np.save(folder / f"{name}.npy", np.ones(shape, np.float32))
    return epath.Path(folder)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(36, 3), (36, 3)], FeatureShape(36, 3)),
        ([(7, 7, 3), (49, 3), (1, 49, 3)], FeatureShape(49, 3)),
        ([(196, 5)], FeatureShape(196, 5)),
        ([(10, 3), (10, 10, 3), (37, 3)], FeatureShape(100, 3, positions_vary=True)),
    ],
)
def test_the_shape_of_a_folder_is_that_of_its_largest_map(tmp_path, shapes, expected):
    maps = {f"{n}.jpg": shape for n, shape in enumerate(shapes)}
    assert npy_maps.find_shape(save(tmp_path, maps), list(maps)) == expected


def test_only_headers_are_read_to_find_the_shape(tmp_path, monkeypatch):
    folder = save(tmp_path, {"a": (4, 3), "b": (6, 3)})
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("the array was read"))
    assert npy_maps.find_shape(folder, ["a", "b"]) == FeatureShape(6, 3, positions_vary=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 4), "found 4 features a position, expected 3 as in a.npy"),
        ((0, 3), r"found float32 \[0, 3\], expected floats"),
        ((6,), r"found float32 \[6\], expected floats"),
        (None, "not found, expected the features of b"),
    ],
)
def test_a_folder_with_a_map_that_does_not_fit_is_refused(tmp_path, shape, message):
    folder = save(tmp_path, {"a": (4, 3), "c": (4, 3)} | ({"b": shape} if shape else {}))
    with pytest.raises(StoreError, match=rf"^{folder}/b\.npy: {message}"):
        npy_maps.find_shape(folder, ["a", "c", "b"])


def test_unused_positions_are_nan(tmp_path):
    folder = save(tmp_path, {"few": (2, 3), "all": (5, 3), "more": (6, 3)})
    split = Split(folder / "train", 3, 3)
    write_rows(split.path, [Row(k, name, ("a",)) for k, name in enumerate(("few", "all", "more"))])
    load = npy_maps.loader(folder, split, FeatureShape(5, 3, positions_vary=True))
    for row, used in ((0, 2), (1, 5)):
        feats_PF = load(row)
        assert feats_PF.shape == (5, 3)
        assert (feats_PF[:used] == 1).all()
        assert np.isnan(feats_PF[used:]).all()
    with pytest.raises(
        StoreError, match=r"more\.npy: found 6 positions of 3 features, expected at most 5 positions of 3 features$"
    ):
        load(2)
