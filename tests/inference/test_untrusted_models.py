"""Weights and models from untrusted sources are read as data, in bounded memory, or refused by name."""

import json
import os
import pathlib
import shutil
import zlib

import pytest
import tensorstore as ts
from etils import epath
from torture_cases import files as torture_files
from trained import Trained

from flaxcap.config import ConfigError
from flaxcap.encoders.base import WeightsError
from flaxcap.encoders.inception_v3 import weights
from flaxcap.files import integrity, size_limits
from flaxcap.files.params import CheckpointError
from flaxcap.inference import export, loading
from flaxcap.text.vocabulary import VocabularyError

# Where one array cannot be read, Orbax closes its event loop while TensorStore reads the others, which complain.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in. None.*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)

# Weights


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (2, 3, 3, 20)},
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True, "chunks": (3, 3, 3, 32)},
    ],
)
def test_weights_in_chunks_and_packed_by_gzip_are_read(options, tmp_path):
    torture_files.write_weights(tmp_path / "w.h5", **options).close()
    assert (weights.read(tmp_path / "w.h5", "mixed0")["conv2d_1"]["kernel"] == 1).all()


def test_weights_that_unpack_to_more_than_their_shape_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.h5"
    with torture_files.write_weights(path, compression="gzip", chunks=(3, 3, 3, 32)) as file:
        file["conv2d_1/kernel:0"].id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(64 << 20)))
    with pytest.raises(WeightsError, match=r"w\.h5: layer conv2d_1, kernel: found a chunk that unpacks to more than"):
        weights.read(path, "mixed0")
    with torture_files.write_weights(path, compression="gzip", chunks=(3, 3, 3, 32)) as file:
        file["conv2d_1/kernel:0"].id.write_direct_chunk((0, 0, 0, 0), bytes(1 << 20))
    with pytest.raises(WeightsError, match="a chunk that is larger packed than unpacked"):
        weights.read(path, "mixed0")
    torture_files.write_weights(path, compression="lzf").close()
    with pytest.raises(WeightsError, match=r"packed by HDF5's filters \[.*32000\], expected gzip or none"):
        weights.read(path, "mixed0")
    torture_files.write_weights(path, chunks=(1, 1, 3, 32)).close()
    for name, limit, message in (
        (weights, "_CHUNK_BYTES", r"found chunks of 384 bytes, expected at most 100"),
        (size_limits, "WEIGHTS", r"w\.h5: found \d+ bytes, expected at most 100"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, limit, 100)
            with pytest.raises(WeightsError, match=message):
                weights.read(path, "mixed0")


# Models


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("export") / "model"
    export.write(loading.load_run(trained.workdir, trained.data_dir), path)
    return path


@pytest.fixture
def model(exported, tmp_path) -> pathlib.Path:
    """An export as a stranger could have made it, to be changed; `write_member` makes the checksums right."""
    path = shutil.copytree(exported, tmp_path / "model")
    edit(path / "about.json", files={})
    return path


def edit(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refuse(model: pathlib.Path, message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError, VocabularyError), match=message) as error:
        loading.load_export(model)
    assert str(error.value).startswith(str(model))


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_model_without_checksums_is_refused(model, part):
    assert loading.load_export(model).vocabulary
    (model / part / integrity.CHECKSUMS).unlink()
    refuse(model, rf"{part}/{integrity.CHECKSUMS}: missing")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**40, 0, -1, "wide", [], None, 10**9])
def test_a_width_that_cannot_be_is_refused(model, value):
    edit(model / "about.json", feature_dim=value)
    refuse(model, r"about\.json: cannot be read")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "null", '"x"', "{}", "\0", " " * (size_limits.PRESET + 1)])
@pytest.mark.parametrize("name", ["about.json", "config.json", "vocabulary.json"])
def test_a_models_json_that_cannot_be_is_refused(model, name, content):
    (model / name).write_text(content)
    if (name, content) != ("config.json", "{}"):  # which is the default preset
        refuse(model, name.replace(".", r"\."))


def test_a_models_preset_is_checked_and_named(model):
    tree = json.loads((model / "config.json").read_text())
    tree["decode"]["max_length"] = 10**9
    (model / "config.json").write_text(json.dumps(tree))
    refuse(model, r"config\.json: --config\.decode\.max_length=1000000000: expected 1 to 10000")


def write_member(folder: pathlib.Path, name: str, **changes) -> None:
    """Changes what an array of a checkpoint says of itself: zarr's metadata, which Orbax keeps in an OCDBT."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    tree = json.loads(store.read(f"{name}/.zarray").result().value)
    store.write(f"{name}/.zarray", json.dumps(tree | changes).encode()).result()
    integrity.write_checksums(epath.Path(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [10**7, 10**7]}, r"head/kernel has shape \(10000000, 10000000\), expected \(32, 32\)"),
        ({"chunks": [10**6, 10**5]}, r"in chunks of \(1000000, 100000\)|cannot be read"),
        ({"dtype": "<i4"}, r"found int32 .* expected floats"),
        ({"dtype": "|S9"}, "decoder: "),
        ({"shape": []}, "decoder: "),
        ({"compressor": {"id": "none such"}}, "decoder: cannot be read"),
    ],
)
def test_arrays_of_any_other_kind_are_refused_before_they_are_read(model, changes, message):
    """A hundred terabytes are not asked for: the shape is compared first."""
    write_member(model / "decoder", "head.kernel", **changes)
    refuse(model, message)


@pytest.mark.parametrize("kind", ["out", "device", "fifo", "gone"])
def test_links_and_devices_in_a_model_are_refused(model, kind, tmp_path):
    place = model / "decoder" / "more"
    if kind == "fifo":
        os.mkfifo(place)
    else:
        (tmp_path / "secret").write_text("secret")
        place.symlink_to({"out": tmp_path / "secret", "device": "/dev/zero", "gone": tmp_path / "gone"}[kind])
    refuse(model, r"decoder/more: found a link or a device, expected a file \(`cp -rL` makes one\)")


def test_links_within_a_model_are_followed(model):
    (model / "about.json").rename(model / "really.json")
    (model / "about.json").symlink_to("really.json")
    loading.load_export(model)


def test_a_model_of_too_many_bytes_is_not_read(model, monkeypatch):
    monkeypatch.setattr(size_limits, "EXPORT", 1000)
    refuse(model, r"found \d+ bytes, expected at most 1000")
