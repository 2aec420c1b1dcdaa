"""Every test runs on eight simulated CPU devices, with rank promotion an error and fixed random examples."""

import os
import pathlib
import shutil
import tempfile

from command import LEFT_OUT, QUICK_TO_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}"
)
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Many tests compile the same programs, in this process, in others' and in programs that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="flaxcap-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples every time, and no time limit for one: the machine may be busy.
hypothesis.settings.register_profile("flaxcap", deadline=None, derandomize=True)
hypothesis.settings.load_profile("flaxcap")


def pytest_report_header() -> list[str]:
    return [f"XLA_FLAGS: this jaxlib does not know {' '.join(LEFT_OUT)}, left out"] if LEFT_OUT else []


ROOT = pathlib.Path(__file__).resolve().parent.parent


def _from_environment(name: str, what: str) -> pathlib.Path:
    """Returns the path that an environment variable names. Skips the test where it names none."""
    if name not in os.environ:
        pytest.skip(f"no {what}: set {name} to run this test")
    return pathlib.Path(os.environ[name])


@pytest.fixture(scope="session")
def flickr_dir() -> pathlib.Path:
    """A directory with Flickr8k's photographs, captions, and train and dev splits."""
    return _from_environment("FLAXCAP_TEST_PHOTOS", "real photographs (Flickr8k's directory)")


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluates without METEOR, which takes 8 s; tests/metrics and tests/test_end_to_end.py compute it."""
    from flaxcap.metrics import meteor_spice

    monkeypatch.setattr(meteor_spice, "find_java", lambda: None)


@pytest.fixture(scope="session")
def inception_h5() -> pathlib.Path:
    """Trained InceptionV3 weights in the layout of Keras's no-top file."""
    return _from_environment("FLAXCAP_TEST_WEIGHTS", "trained InceptionV3 weights (Keras's no-top .h5)")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A small trained run, see tests/trained.py; made when the first test asks for it."""
    from trained import make

    return make(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from launch_stub import commit

    return commit(tmp_path_factory.mktemp("committed"))


@pytest.fixture
def launch(tmp_path: pathlib.Path, committed: pathlib.Path):
    """launch.sh in a repository of its own, see tests/launch_stub.py."""
    from launch_stub import Launch

    return Launch(tmp_path, committed)


@pytest.fixture
def pod(launch):
    """The same with a TPU VM named."""
    launch.env |= {"TPU_NAME": "pod", "ZONE": "z1", "TYPE": "v6e-8"}
    launch.env |= {"WORKDIR": "gs://b/run", "DATA_DIR": "gs://b/data"}
    return launch


@pytest.fixture
def vm(pod):
    """gcloud's stand-in makes a VM out of a directory and runs the real worker commands in it."""
    if not (shutil.which("flock") and shutil.which("setsid")):
        pytest.skip("flock and setsid, which every TPU VM has, are not here")
    (pod.stub / "bucket").mkdir()
    yield pod
    if (pod.stub / "machine").exists():  # a test that failed may have left its program running
        pod("worker", "stop", HOME=str(pod.stub / "machine"), STOP_TIMEOUT="0.1")
