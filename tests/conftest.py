"""Every test runs on eight simulated CPU devices, with rank promotion an error."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def flickr_dir() -> pathlib.Path:
    """Real photographs with captions: Flickr8k's train and dev splits, where they are at hand."""
    path = SHARED / "flickr8k"
    if not path.is_dir():
        pytest.skip(f"no real photographs at {path}")
    return path


@pytest.fixture(scope="session")
def inception_h5() -> pathlib.Path:
    """Real InceptionV3 weights in the layout of Keras's no-top file, where they are at hand."""
    path = SHARED / "weights" / "inception_v3_tf2015_notop.h5"
    if not path.is_file():
        pytest.skip(f"no real weights at {path}")
    return path
