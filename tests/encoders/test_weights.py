"""Weights files are read as data. A file that does not fit is refused with the name of the layer."""

import hashlib
import re

import h5py
import jax
import numpy as np
import pytest

from flaxcap.encoders.base import WeightsError
from flaxcap.encoders.inception_v3 import network, weights

BLOCK = "mixed0"  # twelve convolutions: a small file


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    params = network.init(jax.random.key(0), BLOCK)
    for conv in params.values():
        conv["beta"], conv["mean"], conv["var"] = draw.uniform(0, 1, (3, *conv["beta"].shape)).astype(np.float32)
    return params


def official(params, first=1, suffix=":0"):
    """Returns {path in the file: array} in the layout of Keras's no-top file. Layers are numbered from `first`."""
    arrays = {}
    for number, conv in enumerate(params.values(), first):
        tail = f"_{number}" if number else ""
        arrays[f"conv2d{tail}/conv2d{tail}/kernel{suffix}"] = conv["kernel"]
        norm = f"batch_normalization{tail}/batch_normalization{tail}"
        arrays |= {
            f"{norm}/beta{suffix}": conv["beta"],
            f"{norm}/moving_mean{suffix}": conv["mean"],
            f"{norm}/moving_variance{suffix}": conv["var"],
        }
    return arrays


def write(path, arrays):
    with h5py.File(path, "w") as file:
        file.create_group("activation")
        for name, array in arrays.items():
            file[name] = array
    return path


@pytest.mark.parametrize(("first", "suffix"), [(1, ":0"), (0, ""), (0, ":0"), (94, ":0"), (95, "")])
def test_every_numbering_of_keras_is_read(params, tmp_path, first, suffix):
    path = write(tmp_path / "weights.h5", official(params, first, suffix))
    loaded, sha256 = weights.load(str(path), block=BLOCK)
    assert list(loaded) == list(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_early_block_is_read_from_the_complete_file(inception_h5):
    early, whole = weights.read(inception_h5, "mixed3"), weights.read(inception_h5)
    assert len(whole) == 94
    assert {name: conv["kernel"].shape for name, conv in whole.items()} == network.kernel_shapes()
    jax.tree.map(np.testing.assert_array_equal, early, {name: whole[name] for name in early})


def cut(name):
    return lambda arrays: arrays.pop(name)


def put(name, array):
    return lambda arrays: arrays.update({name: array})


NORM = "batch_normalization_3/batch_normalization_3/"
DAMAGE = {
    "gap": (cut("conv2d_7/conv2d_7/kernel:0"), ["conv2d_7 is missing", "found 11", "expected 12"]),
    "no first layer": (cut("conv2d_1/conv2d_1/kernel:0"), ["conv2d_13 is missing", "first N being 2"]),
    "no layers": (lambda arrays: arrays.clear(), ["conv2d_1 is missing", "found 0"]),
    "no variance": (cut(NORM + "moving_variance:0"), ["batch_normalization_3", "moving_variance", "[64]"]),
    "shape": (
        put("conv2d_2/conv2d_2/kernel:0", np.zeros((3, 3, 32, 31), np.float32)),
        ["conv2d_2", "kernel", "[3, 3, 32, 31]", "[3, 3, 32, 32]"],
    ),
    "scalar": (put(NORM + "beta:0", np.float32(1)), ["batch_normalization_3", "beta", "[]", "[64]"]),
    "integers": (put(NORM + "beta:0", np.zeros(64, np.int32)), ["beta", "int32", "floats of [64]"]),
    "words": (put(NORM + "beta:0", [b"x"] * 64), ["batch_normalization_3", "beta", "[64]"]),
    "nan": (put(NORM + "beta:0", np.full(64, np.nan, np.float32)), ["beta", "not finite"]),
    "overflow": (put(NORM + "beta:0", np.full(64, 1e300)), ["beta", "not finite"]),
    "variance": (
        put(NORM + "moving_variance:0", np.full(64, -1, np.float32)),
        ["batch_normalization_3", "negative moving_variance"],
    ),
    "link out of the file": (
        put(NORM + "beta:0", h5py.ExternalLink("/etc/other.h5", "/beta")),
        ["found a link"],
    ),
    "soft link": (
        put(NORM + "beta:0", h5py.SoftLink("/conv2d_1")),
        ["batch_normalization_3", "found a link"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_fit_is_refused_by_layer(params, tmp_path, damage):
    arrays = official(params)
    change, words = DAMAGE[damage]
    change(arrays)
    path = write(tmp_path / "weights.h5", arrays)
    with pytest.raises(WeightsError, match=re.escape(str(path))) as caught:
        weights.load(str(path), block=BLOCK)
    assert all(word in str(caught.value) for word in words), caught.value


def test_circular_groups_and_external_data_are_refused(params, tmp_path):
    path = write(tmp_path / "weights.h5", official(params))
    (tmp_path / "raw").write_bytes(bytes(4 * 64))
    with h5py.File(path, "a") as file:
        del file[NORM + "beta:0"]
        file[NORM + "circle"] = file["batch_normalization_3"]
    with pytest.raises(WeightsError, match="batch_normalization_3, beta: found nothing"):
        weights.read(path, BLOCK)
    with h5py.File(path, "a") as file:
        del file[NORM + "circle"]
        file.create_dataset(NORM + "beta:0", (64,), "f4", external=[(tmp_path / "raw", 0, 256)])
    with pytest.raises(WeightsError, match="found data kept in another file"):
        weights.read(path, BLOCK)


def test_damaged_files_are_refused(params, tmp_path):
    path = write(tmp_path / "weights.h5", official(params))
    whole = path.read_bytes()
    for content in (b"", b"not HDF5", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="not a readable HDF5 file"):
            weights.read(path, BLOCK)
    with pytest.raises(WeightsError, match=r"no weights file at .*imagnet"):
        weights.load("imagnet", block=BLOCK)


def test_mutated_files_are_read_or_refused(params, tmp_path):
    path = write(tmp_path / "weights.h5", official(params))
    whole, refused = path.read_bytes(), 0
    described = [found.start() for found in re.finditer(b"TREE|HEAP|SNOD|conv2d|batch", whole)]
    draw = np.random.default_rng(0)
    for _ in range(200):
        mutated = np.frombuffer(whole, np.uint8).copy()
        places = draw.choice(described, 3) + draw.integers(0, 500, 3)
        mutated[places % len(mutated)] = draw.integers(0, 256, 3)
        path.write_bytes(mutated.tobytes())
        try:
            weights.read(path, BLOCK)
        except WeightsError:
            refused += 1
    assert 20 < refused < 180


def test_random_weights_are_measured_and_hashed():
    images = np.random.default_rng(0).integers(0, 256, (2, 83, 83, 3), np.uint8)
    first, hash_first = weights.load("random", block=BLOCK, sample=lambda: images)
    same, hash_same = weights.load("random", block=BLOCK, sample=lambda: images)
    other, hash_other = weights.load("random", block=BLOCK, seed=1, sample=lambda: images)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert hash_first == hash_same != hash_other
    assert (first["conv2d_1"]["var"] != 1).all()
    assert (first["conv2d_1"]["kernel"] != other["conv2d_1"]["kernel"]).any()
    with pytest.raises(WeightsError, match="random encoder weights need images"):
        weights.load("random", block=BLOCK)
