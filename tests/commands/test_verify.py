"""Damage on disk: a changed byte in any file of a store or a checkpoint is found, named and repaired."""

import json
import pathlib
import random
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from etils import epath
from small_step import state_on
from trained import Trained

from flaxcap.commands import train
from flaxcap.commands.main import main
from flaxcap.commands.prepare import prepare
from flaxcap.commands.verify import verify
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.features.shards import StoreError
from flaxcap.features.store import Store
from flaxcap.files import integrity
from flaxcap.files.params import CheckpointError, load_params
from flaxcap.inference import loading
from flaxcap.training import checkpoints as checkpoints_lib
from flaxcap.training import logs
from flaxcap.training.checkpoints import Checkpoints


def files_below(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns all files that are not empty, without locks."""
    found = sorted(f for f in directory.rglob("*") if f.is_file() and f.stat().st_size and f.name != ".lock")
    assert len(found) > 10
    return found


def flip(file: pathlib.Path) -> bytes:
    """Flips a random bit of a file, and returns the original content."""
    original, rng = file.read_bytes(), random.Random(str(file.name))
    data = bytearray(original)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return original


def damaged(directory: pathlib.Path, how: str = "flip") -> Iterator[pathlib.Path]:
    """Damages one file after another, yields it, and restores it."""
    for file in files_below(directory):
        original = flip(file)
        if how == "missing":
            file.unlink()
        yield file
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(original)


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of all files by name, without Orbax's, which hold the time."""
    names = {str(f.relative_to(directory)): f for f in files_below(directory)}
    return {name: f.read_bytes() for name, f in names.items() if not name.startswith("encoder/")}


@pytest.fixture
def data_dir(trained: Trained, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(trained.data_dir, tmp_path / "data"))


@pytest.fixture
def path(data_dir, trained: Trained) -> pathlib.Path:
    """A copy of a prepared store, which a test may damage."""
    return pathlib.Path(store.path_for(data_dir, trained.config))


@pytest.fixture
def workdir(trained: Trained, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(trained.workdir, tmp_path / "run"))


# A store


def test_a_sound_store_and_a_sound_run(trained: Trained, capsys):
    flags = f"--config={trained.preset}", f"--data_dir={trained.data_dir}", f"--workdir={trained.workdir}"
    path = pathlib.Path(store.path_for(trained.data_dir, trained.config))
    for some, directories in (
        (flags[:2], [path]),
        (flags[2:], [trained.workdir / "checkpoints"]),
        (flags, [path, trained.workdir / "checkpoints"]),
    ):
        assert main(["verify", *some]) == 0
        out, _ = capsys.readouterr()
        assert out.endswith(" bytes: sound\n")
        read = sum(f.stat().st_size for d in directories for f in files_below(d) if f.name != integrity.CHECKSUMS)
        assert abs(int(out.split(" files, ")[1].split()[0]) - read) < 5000, out  # config.json and the vocabulary
        assert out.count("\n") == 1


@pytest.mark.parametrize("how", ["flip", "missing"])
def test_damage_of_any_file_of_a_store_is_named(path, how, capsys):
    records = {file: file.read_bytes() for file in path.glob("*/shards/*.json")}
    for file in damaged(path, how):
        report = verify(store_dir=path)
        (line,) = report.wrong
        if how == "missing" and file in records:
            assert line == f"{file.parent.parent}: shards {int(file.stem)} are not finished; `flaxcap prepare` resumes"
        elif how == "missing" and file.parts[-2:] == ("encoder", integrity.CHECKSUMS):
            assert line == f"{file}: missing; `flaxcap prepare` writes it again"
        else:
            assert line.startswith(f"{file}: ")
            assert "flaxcap prepare" in line
        for record, original in records.items():
            # Damaged shards, and no others, have become unfinished.
            at_fault = (
                file == record or file == record.parent.parent / "features" / "c" / str(int(record.stem)) / "0" / "0"
            )
            assert record.exists() != at_fault
            record.write_bytes(original)
    assert verify(store_dir=path).wrong == []


def read_everything(path: pathlib.Path) -> None:
    """Reads a store as training, captioning and preparing do."""
    found = Store(path)
    found.vocabulary()
    for role in found.roles:
        split = found.split(role)
        _ = split.rows
        split.read(split.present())
    load_params(path / "encoder")


def test_reading_a_store_finds_damage_of_any_file(path):
    read_everything(path)
    for file in damaged(path):
        if file.name == store.COPY:  # is read only if the manifest is damaged
            continue
        with pytest.raises(UserError) as error:
            read_everything(path)
        assert str(file) in str(error.value)


def test_prepare_repairs_damaged_files_and_no_others(path, data_dir, trained: Trained, capsys):
    before = snapshot(path)
    shard = path / "train" / "features" / "c" / "1" / "0" / "0"
    cut = path / "val" / "features" / "c" / "0" / "0" / "0"
    params = max((path / "encoder").rglob("d/*"), key=lambda f: f.stat().st_size)
    small = [path / name for name in ("manifest.json", "vocabulary.json", "val/captions.jsonl")]
    small += [path / name for name in ("test/features/zarr.json", "test/shards/00000.json")]
    for file in (shard, params, *small):
        flip(file)
    cut.write_bytes(cut.read_bytes()[:-100])  # found without reading the file
    kept = path / "train" / "features" / "c" / "0" / "0" / "0"
    modified = kept.stat().st_mtime_ns

    flags = [f"--config={trained.preset}", f"--data_dir={data_dir}"]
    assert main(["verify", *flags]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(": ")[0] for line in lines[:-1]} == {str(f) for f in (shard, cut, params, *small)}
    assert f"{shard}: damaged: found SHA-256" in lines[3] + lines[4] + lines[5]
    assert lines[-1].endswith(" bytes: 8 damaged")
    assert main(["prepare", *flags, "--num_workers=2"]) == 0
    out = capsys.readouterr().out
    images = 12 + 8 + 8  # shard 1 of train, and those of val and test
    assert f"features of {images} images: " in out
    assert kept.stat().st_mtime_ns == modified
    assert main(["verify", *flags]) == 0
    assert snapshot(path) == before
    expected = load_params(store.path_for(trained.data_dir, trained.config) / "encoder")
    jax.tree.map(np.testing.assert_array_equal, load_params(path / "encoder"), expected)


def test_prepare_finds_missing_and_truncated_shards(path, data_dir, trained: Trained, capsys):
    before = snapshot(path)
    shards = [path / "train" / "features" / "c" / str(number) / "0" / "0" for number in (0, 1)]
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    flip(path / store.COPY)
    prepare(trained.config, data_dir, num_workers=2)
    out = capsys.readouterr().out
    assert f"{shards[0]}: missing; shard 0 of train is computed again" in out
    assert f"{shards[1]}: damaged: found" in out
    assert "features of 32 images: " in out
    assert snapshot(path) == before


def test_damaged_files_are_not_replaced_by_those_of_other_data(path, data_dir, trained, monkeypatch):
    from flaxcap.encoders.inception_v3 import weights
    from flaxcap.features import build

    captions = path / "train" / "captions.jsonl"
    original = flip(captions)
    with monkeypatch.context() as context:
        found = Store(trained_path := store.path_for(trained.data_dir, trained.config)).split("train").rows
        assert trained_path
        context.setattr(build, "read_rows", lambda *_: found[:-1])
        with pytest.raises(StoreError, match=rf"{captions}: damaged.*found other captions in the data set"):
            prepare(trained.config, data_dir)
    captions.write_bytes(original)
    (path / "encoder" / integrity.CHECKSUMS).unlink()
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda *a, **k: (load(*a, **k)[0], "f" * 64))
    with pytest.raises(StoreError, match=r"json: missing; found weights f+, expected .*, which made the features"):
        prepare(trained.config, data_dir)


def test_files_without_checksums_are_damaged(path, data_dir, trained: Trained):
    before, manifest = snapshot(path), store.read_manifest(epath.Path(path / "manifest.json"))
    (path / "encoder" / integrity.CHECKSUMS).unlink()
    records = sorted(path.glob("*/shards/*.json"))
    for record in records:
        record.write_text(json.dumps({"skipped": [], "file": json.loads(record.read_text())["file"]}) + "\n")
    wrong = verify(store_dir=path).wrong
    assert {line.partition(": ")[0] for line in wrong} == {
        *map(str, records),
        str(path / "encoder" / integrity.CHECKSUMS),
    }
    prepare(trained.config, data_dir, num_workers=2)
    assert snapshot(path) == before
    del manifest["files"]
    store.write_manifest(epath.Path(path), manifest)
    with pytest.raises(StoreError, match=r"not a manifest of features \(KeyError\('files'\)\)"):
        verify(store_dir=path)


# A run


@pytest.mark.parametrize("how", ["flip", "missing"])
def test_damage_of_any_file_of_a_run_is_named(workdir, how):
    steps = sorted((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert len(steps) > 1
    for file in damaged(workdir / "checkpoints", how):
        report = verify(workdir=workdir)
        (line,) = report.wrong
        assert line.startswith(f"{file}: ")
        assert "flaxcap train" in line
    for file in (workdir / "config.json", workdir / "vocabulary.json", workdir / "data.json"):
        original = flip(file)
        (line,) = verify(workdir=workdir).wrong
        assert line.startswith(f"{file}: ")
        file.write_bytes(original)
    assert verify(workdir=workdir).wrong == []


def test_a_save_killed_before_its_checksums_gets_them(workdir, data_dir):
    files = [step / integrity.CHECKSUMS for step in (workdir / "checkpoints").iterdir()]
    before = {file: file.read_bytes() for file in files}
    for file in files:
        file.unlink()
    assert sorted(verify(workdir=workdir).wrong) == sorted(
        f"{file}: missing; a save is in progress or was killed; `flaxcap train` writes it" for file in files
    )
    with pytest.raises(CheckpointError, match=rf"{integrity.CHECKSUMS}: missing"):
        loading.load_run(workdir, data_dir)
    checkpoints_lib.repair(workdir / "checkpoints")
    assert {file: file.read_bytes() for file in files} == before
    loading.load_run(workdir, data_dir)


def test_restoring_a_checkpoint_finds_damage_of_any_file(tmp_path):
    saved = state_on(1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, saved, {"best": 1.5}, 2.0)
    checkpoints.close()
    for file in damaged(tmp_path):
        with pytest.raises(CheckpointError) as error:
            Checkpoints(tmp_path).restore(saved)
        assert str(file) in str(error.value)
        if "rest" not in file.parts and "progress" not in file.parts:
            with pytest.raises(CheckpointError, match="damaged"):
                Checkpoints(tmp_path).restore_params(saved.params, 7)
    checkpoints = Checkpoints(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(saved)[0], saved)
    checkpoints.close()


def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_bit_equal(workdir, data_dir, trained: Trained, capsys):
    before = sorted(step.name for step in (workdir / "checkpoints").iterdir())
    assert len(before) > 1
    newest = workdir / "checkpoints" / max(before, key=int)
    file = max(newest.rglob("d/*"), key=lambda f: f.stat().st_size)
    flip(file)
    (workdir / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()
    train.train(trained.config, workdir, data_dir)
    out = capsys.readouterr().out
    aside = workdir / "checkpoints-damaged" / newest.name
    assert f"{file}: damaged: found SHA-256" in out
    assert f"; the checkpoint is set aside: {aside}\n" in out
    assert aside.is_dir()
    assert f"resumes at step {min(before, key=int)}\n" in out
    assert sorted(step.name for step in (workdir / "checkpoints").iterdir()) == before
    ours, theirs = (
        [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in logs.read(w)]
        for w in (workdir, trained.workdir)
    )
    assert ours == theirs
    assert verify(workdir=workdir).wrong == []


def test_a_run_with_damaged_checkpoints_only_is_refused(workdir, data_dir, trained: Trained):
    for step in (workdir / "checkpoints").iterdir():
        flip(step / "progress" / "metadata")
    before = {f: f.read_bytes() for f in files_below(workdir / "checkpoints")}
    with pytest.raises(
        CheckpointError, match=rf"every checkpoint is damaged; delete {workdir}/checkpoints to start again"
    ):
        train.train(trained.config, workdir, data_dir)
    assert {f: f.read_bytes() for f in files_below(workdir / "checkpoints")} == before
    shutil.rmtree(workdir / "checkpoints")
    train.train(trained.config, workdir, data_dir)


def test_a_run_with_a_damaged_best_checkpoint_is_not_loaded(workdir, data_dir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    best = workdir / "checkpoints" / str(checkpoints.best_step)
    checkpoints.close()
    file = max(best.rglob("params/**/d/*"), key=lambda f: f.stat().st_size)
    flip(file)
    with pytest.raises(CheckpointError, match=rf"^{file}: damaged"):
        loading.load_run(workdir, data_dir)


def test_a_missing_run_or_store_is_named(tmp_path, capsys, trained: Trained):
    with pytest.raises(UserError, match=f"--workdir={tmp_path}: found neither config.json nor checkpoints"):
        verify(workdir=tmp_path)
    assert main(["verify", f"--config={trained.preset}", f"--data_dir={tmp_path}"]) == 1
    assert "no prepared features at" in capsys.readouterr().err
    assert main(["verify"]) == 1
    assert "nothing to verify is named: give --workdir=RUN, or --config and --data_dir" in capsys.readouterr().err
