"""Where features come from: the encoder on all devices, or `.npy` files made elsewhere."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.config import Encoder
from flaxcap.encoders.inception_v3 import network
from flaxcap.features import extract, store
from flaxcap.features.store import POSITIONS, Row, Split, StoreError

ENCODER = Encoder(weights="random", block="mixed0", image_size=160, store_dtype="float32")
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 160, 160, 3), np.uint8)


@pytest.fixture(scope="module")
def params() -> network.Params:
    return network.measure(network.init(jax.random.key(0), "mixed0"), IMAGES, "mixed0")


@pytest.fixture(scope="module")
def expected(params) -> np.ndarray:
    """The features, all on one device."""
    assert jax.device_count() == 8
    folded = jax.device_put(network.fold(params), jax.devices()[0])
    apply = jax.jit(lambda images: network.apply(folded, images, block="mixed0"))
    return np.asarray(apply(jax.device_put(IMAGES, jax.devices()[0])))


@pytest.mark.parametrize(("count", "many"), [(8, False), (8, True), (3, True)])
def test_eight_devices_give_what_one_gives(params, expected, count, many):
    found = extract.make_encode(params, ENCODER, many=many)(IMAGES[:count])
    assert isinstance(found, jax.Array)
    assert found.dtype == np.float32
    assert len(found.sharding.device_set) == 8
    rows = 1 if count == 8 else 3  # shared out where they can be, else on each
    assert {shard.data.shape for shard in found.addressable_shards} == {(rows, POSITIONS, 256)}
    np.testing.assert_allclose(np.asarray(found), expected[:count], atol=1e-4)
    assert np.std(expected) > 0.1


def test_features_are_rounded_to_the_store(params, expected):
    encoder = Encoder(weights="random", block="mixed0", image_size=160)
    found = np.asarray(extract.make_encode(params, encoder, many=True)(IMAGES))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-3)


def test_the_number_of_images_a_pass_suits_the_devices():
    assert extract.batch_size(Encoder(batch_size=5)) == 5
    assert extract.batch_size(Encoder(batch_size=0)) == 2 * 8


WIDTH = 3
NAMES = ("0.jpg", "sub/0.jpg", "b.c.png")


def feature_maps() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(len(NAMES), POSITIONS, WIDTH)).astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Feature maps as they are found: FILENAME.npy, [64, F] or [8, 8, F]."""
    folder = tmp_path / "npy"
    shapes = ((POSITIONS, WIDTH), (8, 8, WIDTH), (1, POSITIONS, WIDTH))
    for name, feats, shape in zip(NAMES, feature_maps(), shapes, strict=True):
        file = folder / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, feats.reshape(shape))
    return folder


def run(tmp_path: pathlib.Path, folder: pathlib.Path, dtype: str = "float32") -> np.ndarray:
    """Imports them as `flaxcap prepare` does; what the store then holds."""
    split = Split(epath.Path(tmp_path) / f"train-{dtype}", len(NAMES), 2)
    store.write_rows(split.path, [Row(k, name, ("a",)) for k, name in enumerate(NAMES)])
    extract.extract(
        split,
        extract.npy_loader(epath.Path(folder), split, WIDTH),
        np.asarray,
        batch_size=2,
        at_once=2,
        feature_dim=WIDTH,
        dtype=dtype,
        num_workers=1,
        max_bad_fraction=0,
        name="npy",
    )
    return split.read(range(len(NAMES)))


def test_feature_maps_are_imported_in_either_shape(tmp_path, folder):
    np.testing.assert_array_equal(run(tmp_path, folder), feature_maps())
    rounded = run(tmp_path, folder, "bfloat16")
    np.testing.assert_array_equal(rounded, feature_maps().astype(ml_dtypes.bfloat16))


def test_images_of_one_name_in_two_folders_are_told_apart(tmp_path, folder):
    (folder / "sub" / "0.jpg.npy").unlink()
    with pytest.raises(StoreError, match=r"npy/sub/0\.jpg\.npy: not there"):
        run(tmp_path, folder)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((POSITIONS, WIDTH + 1), np.float32), "features of b.c.png are 4 wide, expected 3"),
        (
            np.zeros((7, 8, WIDTH), np.float32),
            r"b\.c\.png\.npy: found float32 \[7, 8, 3\], expected floats of \[64, F\]",
        ),
        (np.zeros((WIDTH, POSITIONS), np.float32), r"found float32 \[3, 64\]"),
        (np.zeros(POSITIONS * WIDTH, np.float32), r"found float32 \[192\]"),
        (np.zeros((), np.float32), r"found float32 \[\]"),
        (np.zeros((POSITIONS, WIDTH), np.int32), r"found int32 \[64, 3\]"),
        (np.full((POSITIONS, WIDTH), "x"), r"found <U1 \[64, 3\]"),
        (np.full((POSITIONS, WIDTH), np.nan, np.float32), "not finite"),
        (np.full((POSITIONS, WIDTH), {"a": 1}), "not a NumPy array .*allow_pickle"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, folder, array, message):
    np.save(folder / "b.c.png.npy", array)
    with pytest.raises(StoreError, match=message):
        run(tmp_path, folder)


class Trap:
    """What would run if it were unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("trap-was-sprung"),)


def test_a_pickle_is_never_opened(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(folder / "0.jpg.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(StoreError, match=r"0\.jpg\.npy: not a NumPy array"):
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
    whole = file.read_bytes()
    assert np.array_equal(extract.read_npy(epath.Path(folder), "0.jpg"), feature_maps()[0])
    if isinstance(damage, int):  # cut off, or overwritten in its header
        file.write_bytes(whole[:damage] if data.draw(st.booleans()) else b"?" * (damage % 100 + 1) + whole)
    else:
        file.write_bytes(damage)
    with pytest.raises(StoreError, match=r"/0\.jpg\.npy: not a NumPy array"):
        extract.read_npy(epath.Path(folder), "0.jpg")


def test_an_archive_of_arrays_is_not_an_array(tmp_path, folder):
    with (folder / "0.jpg.npy").open("wb") as file:
        np.savez(file, feature_maps()[0])
    with pytest.raises(StoreError, match="not a NumPy array"):
        run(tmp_path, folder)


def test_a_header_that_lies_about_its_size_is_refused(tmp_path, folder):
    file = folder / "0.jpg.npy"
    with file.open("wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(StoreError, match="not a NumPy array"):
        run(tmp_path, folder)
