"""`flaxcap prepare` with imported feature maps, and with weights of a file."""

import hashlib
import pathlib
from dataclasses import replace

import h5py
import numpy as np
import pytest
from prepared_folder import RANDOM, WIDTH, imported, write_folder, write_maps

from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, ConfigError, Data, Shapes
from flaxcap.encoders import base as encoders
from flaxcap.encoders.inception_v3 import network, weights
from flaxcap.features.shards import StoreError


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
