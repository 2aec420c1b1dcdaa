"""Full and read-only disks: commands end with one line, lose nothing, and resume when there is space."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from small_step import state_on
from tiny_store import tiny_config, write_store
from trained import Trained

from flaxcap import presets
from flaxcap.commands.main import main
from flaxcap.commands.verify import verify
from flaxcap.config import Config
from flaxcap.features import store
from flaxcap.features.shards import StoreError
from flaxcap.files.params import CheckpointError
from flaxcap.inference import loading
from flaxcap.training import checkpoints, logs
from flaxcap.training.checkpoints import Checkpoints

FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path) -> Iterator[pathlib.Path]:
    """A file system of 32 MiB. It takes root to mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", path]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk: pathlib.Path, left: int) -> pathlib.Path:
    """Writes a file that leaves `left` bytes of the disk free."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free - left
    with ballast.open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, free)
    return ballast


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("flaxcap ")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    write_store(path, tiny_config())
    return path


def steady(epochs: int = 3) -> Config:
    """Returns a preset whose steps do not depend on the number of epochs."""
    return tiny_config(schedule="constant", epochs=epochs)


def train(config: Config, workdir: pathlib.Path, data_dir: pathlib.Path) -> int:
    preset = data_dir / "preset.json"
    preset.write_text(presets.to_json(config))
    return main(["train", f"--config={preset}", f"--data_dir={data_dir}", f"--workdir={workdir}"])


def newest(workdir: pathlib.Path) -> dict:
    """Returns the step of the newest checkpoint, and the log without times."""
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    lines = [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in logs.read(workdir)]
    return {"step": step, "lines": lines}


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run that always had space."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert train(steady(), workdir, data_dir) == 0
    return workdir


@pytest.mark.parametrize("left", [0, 8 << 10, 100 << 10])
def test_train_on_a_full_disk_ends_with_a_line_and_resumes_later(disk, data_dir, undisturbed, left, capsys):
    workdir, config = disk / "run", steady()
    assert train(steady(epochs=1), workdir, data_dir) == 0
    before = newest(workdir)
    ballast = fill(disk, left)
    capsys.readouterr()
    assert train(config, workdir, data_dir) == 1
    line = one_line(capsys)
    assert line.startswith("flaxcap train: ")
    assert FULL in line
    assert str(workdir) in line
    assert newest(workdir)["step"] == before["step"]
    assert verify(workdir=workdir).wrong == []  # the last good checkpoint is sound
    ballast.unlink()
    assert train(config, workdir, data_dir) == 0
    assert verify(workdir=workdir).wrong == []
    assert newest(workdir) == newest(undisturbed)


def test_a_read_only_disk_is_named_and_can_be_read(disk, trained: Trained, capsys):
    workdir = pathlib.Path(shutil.copytree(trained.workdir, disk / "run"))
    flags = f"--config={trained.preset}", f"--data_dir={trained.data_dir}", f"--workdir={workdir}"
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert main(["train", *flags]) == 1
    assert f"{workdir}/.lock: cannot be written (Read-only file system)" in one_line(capsys)
    assert main(["verify", *flags]) == 0
    assert loading.load_run(workdir, trained.data_dir).about["step"] > 0


def test_prepare_on_a_full_disk_ends_with_a_line_and_resumes_later(disk, trained: Trained, capsys):
    data_dir, config = disk / "data", trained.config
    flags = [f"--config={trained.preset}", f"--data_dir={data_dir}", "--num_workers=2"]
    lines = []
    for left in (0, 4 << 10, 100 << 10, 1 << 20, 2 << 20, 3 << 20):
        ballast = fill(disk, left)
        if main(["prepare", *flags]) == 0:
            break
        lines.append(one_line(capsys))
        assert FULL in lines[-1]
        ballast.unlink()
        with pytest.raises(StoreError, match="flaxcap prepare"):
            store.Store.finished(data_dir, config)
    assert len(set(lines)) > 2, "full at several moments"
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    assert main(["prepare", *flags]) == 0
    found, expected = (store.Store.finished(d, config) for d in (data_dir, trained.data_dir))
    assert found.manifest == expected.manifest
    for role in found.roles:
        ours, theirs = (s.split(role).read(range(s.split(role).images)) for s in (found, expected))
        assert ours.tobytes() == theirs.tobytes()
    assert verify(store_dir=found.path).wrong == []


def test_export_on_a_full_disk_ends_with_a_line_and_succeeds_later(disk, trained: Trained, capsys):
    flags = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}", f"--out={disk / 'model'}"]
    for left in (0, 4 << 10, 200 << 10):
        ballast = fill(disk, left)
        assert main(["export", *flags]) == 1
        line = one_line(capsys)
        assert FULL in line
        assert str(disk / "model") in line
        ballast.unlink()
        with pytest.raises(CheckpointError, match=r"neither a run nor an export"):
            loading.load_export(disk / "model")
    assert main(["export", *flags]) == 0
    loading.load_export(disk / "model")


# Tests that need no root


CUT_OFF = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from small_step import state_on
from flaxcap.files.params import CheckpointError
from flaxcap.training.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[2])
checkpoints.save(1, state_on(1, width=2000), {"best": 1.5}, 2.0)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, state_on(1, width=2000), {"best": 1.5}, 3.0)
    checkpoints.wait()
except CheckpointError as e:
    print(e)
"""


def test_a_checkpoint_that_cannot_be_written_keeps_the_previous_one(tmp_path):
    """The writer is another process, limited to files of 4 KiB: Orbax leaves threads of a failed save running."""
    command = [sys.executable, "-c", CUT_OFF, str(pathlib.Path(__file__).parent.parent), str(tmp_path)]
    # The limit would also truncate the compilation cache, which other tests read.
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}: a checkpoint cannot be written (")
    assert "File too large" in done.stdout
    assert "; the last one is kept\n" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2.orbax-checkpoint-tmp"}
    saved = state_on(1, width=2000)
    checkpoints.repair(tmp_path)
    again = Checkpoints(tmp_path)
    assert (again.best_step, again.latest_step) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, again.restore(saved)[0], saved)
    again.save(2, saved, {}, 3.0)
    again.wait()
    assert (again.best_step, again.latest_step) == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    again.close()


def test_a_directory_without_permission_is_named(data_dir, tmp_path, capsys):
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("root may write anywhere")
        assert train(tiny_config(), tmp_path / "run", data_dir) == 1
        assert f"{tmp_path}/run/.lock: cannot be written (Permission denied)" in one_line(capsys)
    finally:
        tmp_path.chmod(0o755)
