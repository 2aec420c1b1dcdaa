"""`flaxcap prepare` writes a store once: it resumes, repairs, and leaves finished files as they are."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest

from flaxcap import presets
from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, Data, Encoder, Shapes
from flaxcap.data import datasets
from flaxcap.data.base import Examples
from flaxcap.encoders import base as encoders
from flaxcap.encoders.inception_v3 import weights
from flaxcap.features import extract, store
from flaxcap.features.shards import StoreError
from flaxcap.features.store import Store
from flaxcap.files.integrity import WriteError
from flaxcap.files.params import load_params
from flaxcap.images import decode

ENCODER = {"block": "mixed0", "image_size": 160, "batch_size": 8}


DESCRIBED = {"manifest.json", "manifest.copy.json", "vocabulary.json"}


def rendered() -> Config:
    """A preset of rendered scenes in many small shards."""
    return Config(
        dataset="shapes",
        data=Data(shapes=Shapes(num_train=48, num_val=4, num_test=3)),
        encoder=Encoder(weights="random", shard_images=4, **ENCODER),
    )


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def times(directory: pathlib.Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


def forbid(monkeypatch, *functions):
    for module, name in functions:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    """A data directory with the store of `rendered`, which tests read or copy."""
    data_dir = tmp_path_factory.mktemp("data")
    prepare(rendered(), data_dir, num_workers=2)
    return data_dir


@pytest.fixture
def data_dir(undisturbed, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(undisturbed, tmp_path / "data"))


# The store


def test_the_store_holds_captions_features_and_their_origin(undisturbed):
    config = rendered()
    found = Store.finished(undisturbed, config)
    assert found.roles == ("train", "val", "test")
    assert (found.positions, found.feature_dim, found.positions_vary) == (64, 256, False)
    builder = datasets.prepare_for(config, undisturbed)
    encoder = encoders.make(config.encoder)
    encode = extract.make_encode(encoder, load_params(found.path / "encoder"), config.encoder, many=False)
    for role, count in (("train", 48), ("val", 4), ("test", 3)):
        split, examples = found.split(role), list(Examples(builder, role))
        assert split.images == len(examples) == count
        assert [row.captions for row in split.rows] == [example.captions for example in examples]
        assert [row.image_id for row in split.rows] == [example.image_id for example in examples]
        some = np.linspace(0, count - 1, 3).astype(int)
        expected = np.asarray(encode(np.stack([decode.to_square(examples[k].image, 160) for k in some]))).astype(float)
        np.testing.assert_allclose(split.read(some).astype(float), expected, rtol=0.02, atol=0.01)
        assert not np.isnan(split.read(range(count)).astype(float)).any()
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest["source"] == builder.info.full_name
    assert manifest["splits"]["train"] == {"split": "train", "images": 48, "shards": 12, "skipped": []}
    assert manifest["encoder"]["preset"]["block"] == "mixed0"
    assert manifest["encoder"]["preprocessing"] == decode.describe(encoder.preprocess)
    assert len(manifest["encoder"]["weights_sha256"]) == 64
    vocabulary = found.vocabulary()
    expected = {"size": 5000, "tokenizer": "words", "words": len(vocabulary), "sha256": vocabulary.hash}
    assert manifest["vocabulary"] == expected
    assert {"ring", "left", "above", "striped"} <= set(vocabulary.ids)


def test_a_second_prepare_changes_nothing(data_dir, monkeypatch, capsys):
    forbid(monkeypatch, (weights, "load"), (extract, "extract"), (extract, "make_encode"), (decode, "for_encoder"))
    before, mtimes = snapshot(data_dir), times(data_dir)
    store_again = prepare(rendered(), data_dir, num_workers=2)
    assert snapshot(data_dir) == before
    changed = {name for name, mtime in times(data_dir).items() if mtimes[name] != mtime}
    assert {pathlib.Path(name).name for name in changed} <= {*DESCRIBED, ".lock", ".shapes.lock"}
    assert capsys.readouterr().out.splitlines() == [
        "train: 48 images with features, 0 skipped",
        "val: 4 images with features, 0 skipped",
        "test: 3 images with features, 0 skipped",
        f"prepared: {store_again.path}",
    ]


def test_another_vocabulary_size_changes_the_vocabulary_only(data_dir, monkeypatch):
    forbid(monkeypatch, (weights, "load"), (extract, "extract"))
    config = rendered()
    before = snapshot(data_dir)
    config.data.vocab_size = 3
    with pytest.raises(StoreError, match="vocab_size=5000, expected 3; run `flaxcap prepare`"):
        Store.finished(data_dir, config)
    prepare(config, data_dir)
    assert len(Store.finished(data_dir, config).vocabulary()) == 4 + 3
    after = snapshot(data_dir)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {pathlib.Path(name).name for name in changed} == DESCRIBED
    config.data.max_length = 10  # cuts captions in training
    assert Store.finished(data_dir, config).path == store.path_for(data_dir, rendered())


def test_a_vocabulary_without_its_manifest_is_written_again(data_dir, monkeypatch):
    config = rendered()
    config.data.vocab_size = 3
    monkeypatch.setattr(store, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, data_dir)
    with pytest.raises(StoreError, match="found another vocabulary than the manifest names"):
        Store.finished(data_dir, rendered()).vocabulary()
    monkeypatch.undo()
    prepare(rendered(), data_dir)
    assert len(Store.finished(data_dir, rendered()).vocabulary()) > 7


def test_features_without_a_manifest_are_refused(data_dir):
    path = store.path_for(data_dir, rendered())
    for name in ("manifest.json", "manifest.copy.json"):
        (path / name).unlink()
    with pytest.raises(StoreError, match=rf"{path}: found shards without a manifest\.json, .*; delete the directory"):
        prepare(rendered(), data_dir)
    (path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=rf"not a manifest of features .*; delete {path}"):
        prepare(rendered(), data_dir)


# Interrupted, resumed, and shared by processes


def command(data_dir: pathlib.Path, *more: str) -> list[str]:
    preset = data_dir.parent / "preset.json"
    preset.write_text(presets.to_json(rendered()))
    flags = [f"--config={preset}", f"--data_dir={data_dir}", "--num_workers=2", *more]
    return [sys.executable, "-m", "flaxcap", "prepare", *flags]


def assert_same(data_dir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    """Asserts that both directories hold the same store, bit for bit."""
    found, expected = (Store.finished(d, rendered()) for d in (data_dir, undisturbed))
    assert found.manifest == expected.manifest
    assert found.vocabulary().hash == expected.vocabulary().hash
    for role in found.roles:
        mine, theirs = (s.split(role).read(range(s.split(role).images)) for s in (found, expected))
        assert mine.tobytes() == theirs.tobytes()


def test_a_killed_prepare_resumes(undisturbed, tmp_path):
    data_dir = tmp_path / "data"
    path = pathlib.Path(store.path_for(data_dir, rendered()))
    first = path / "train" / "shards" / "00000.json"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(data_dir), stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while not first.exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.002)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    left = Store(path).split("train").unfinished()
    assert 0 < len(left) < 12, "killed during extraction"
    with pytest.raises(StoreError, match="not finished"):
        Store.finished(data_dir, rendered())
    done = {f"c/{n}/0/0" for n in range(12) if n not in left}
    before = {name: mtime for name, mtime in times(path / "train" / "features").items() if name in done}

    result = subprocess.run(command(data_dir), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    images = 4 * len(left) + 4 + 3
    assert f"features of {images} images: " in result.stdout
    assert "train: 48 images with features, 0 skipped" in result.stdout
    after = times(path / "train" / "features")
    assert before == {name: after[name] for name in done}

    assert_same(data_dir, undisturbed)


def test_two_processes_prepare_the_store_of_one(undisturbed, data_dir):
    shutil.rmtree(data_dir / "features")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        subprocess.Popen(
            command(data_dir, f"--distributed=127.0.0.1:{port},2,{number}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for process in pair:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert "train: 48 images with features, 0 skipped" in out
    assert_same(data_dir, undisturbed)


def test_a_small_disk_is_reported_before_extraction(data_dir, monkeypatch, capsys):
    path = pathlib.Path(store.path_for(data_dir, rendered()))
    for number in (3, 7):
        (path / "train" / "shards" / f"0000{number}.json").unlink()
    needed = 8 * store.bytes_an_image(64, 256, "bfloat16")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed - 1))
    with monkeypatch.context() as context:
        forbid(context, (extract, "extract"))
        message = rf"^{path}: found 0\.3 MB free, expected 0\.3 MB for features of 8 images \(No space left on device\)"
        with pytest.raises(WriteError, match=message):
            prepare(rendered(), data_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed))
    prepare(rendered(), data_dir)
    assert f"features of 8 images: 0.00 GB in {path} (0.0 GB free)" in capsys.readouterr().out
    Store.finished(data_dir, rendered())
