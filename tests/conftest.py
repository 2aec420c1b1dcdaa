"""Every test runs on eight simulated CPU devices, with rank promotion an error and fixed random examples."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples every time, and no time limit for one: the machine may be busy.
hypothesis.settings.register_profile("flaxcap", deadline=None, derandomize=True)
hypothesis.settings.load_profile("flaxcap")

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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A small trained run, see tests/trained.py; made when the first test asks for it."""
    from trained import make

    return make(tmp_path_factory.mktemp("trained"))
