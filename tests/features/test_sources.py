"""The encoder on several devices computes the features of one device, in the store's dtype."""

import jax
import ml_dtypes
import numpy as np
import pytest

from flaxcap.config import Encoder
from flaxcap.encoders import base
from flaxcap.features import extract

ENCODER = Encoder(weights="random", block="mixed0", image_size=160, store_dtype="float32")
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 160, 160, 3), np.uint8)


@pytest.fixture(scope="module")
def encoder() -> base.ImageEncoder:
    return base.make(ENCODER)


@pytest.fixture(scope="module")
def params(encoder) -> base.Params:
    return encoder.load("random", lambda: IMAGES)[0]


@pytest.fixture(scope="module")
def expected(encoder, params) -> np.ndarray:
    """The features, computed on one device."""
    assert jax.device_count() == 8
    folded = encoder.inference_params(params, platform="cpu", dtype=np.float32, many=False)
    folded = jax.device_put(folded, jax.devices()[0])
    apply = jax.jit(lambda images: encoder.apply(folded, images, np.float32))
    return np.asarray(apply(jax.device_put(IMAGES, jax.devices()[0])))


@pytest.mark.parametrize(("count", "many"), [(8, False), (8, True), (3, True)])
def test_eight_devices_compute_the_features_of_one(encoder, params, expected, count, many):
    found = extract.make_encode(encoder, params, ENCODER, many=many)(IMAGES[:count])
    assert isinstance(found, jax.Array)
    assert found.dtype == np.float32
    assert len(found.sharding.device_set) == 8
    rows = 1 if count == 8 else 3  # sharded if the number allows, else replicated
    assert {shard.data.shape for shard in found.addressable_shards} == {(rows, 64, 256)}
    np.testing.assert_allclose(np.asarray(found), expected[:count], atol=1e-4)
    assert np.std(expected) > 0.1


def test_features_are_rounded_to_the_stores_dtype(encoder, params, expected):
    config = Encoder(weights="random", block="mixed0", image_size=160)
    found = np.asarray(extract.make_encode(encoder, params, config, many=True)(IMAGES))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-3)


def test_the_batch_size_is_the_presets_or_suits_the_devices():
    assert extract.batch_size(Encoder(batch_size=5)) == 5
    assert extract.batch_size(Encoder(batch_size=0)) == 2 * 8
