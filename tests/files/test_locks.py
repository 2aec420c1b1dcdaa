"""Locks: a second program in a directory is refused; a process that has ended holds no lock."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from etils import epath
from tiny_store import tiny_config, write_store

from flaxcap import presets
from flaxcap.commands import train
from flaxcap.commands.prepare import prepare
from flaxcap.features import store
from flaxcap.files import locks
from flaxcap.files.locks import LockError

HOLD = """
import sys
from flaxcap.files import locks
with locks.held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another(directory: os.PathLike | str) -> Iterator[subprocess.Popen]:
    """Starts a process that holds the lock of `directory` inside the `with` block."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    write_store(path, tiny_config())
    return path


def test_a_second_program_is_refused_and_the_holder_named(tmp_path):
    with another(tmp_path / "run") as holder:
        for _ in range(2):
            with pytest.raises(LockError) as error, locks.held(tmp_path / "run"):
                pass
            found = f"{tmp_path}/run: in use by process {holder.pid} on {socket.gethostname()}, since 20"
            assert str(error.value).startswith(found)
        with locks.held(tmp_path / "another run"):
            pass


@pytest.mark.parametrize("end", ["killed", "by itself"])
def test_a_process_that_has_ended_holds_no_lock(tmp_path, end):
    with another(tmp_path) as holder:
        if end == "killed":
            holder.kill()
            holder.wait()
        else:
            holder.communicate("")
            assert holder.returncode == 0
        for _ in range(2):  # the end of a block releases it too
            with locks.held(tmp_path):
                assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
                with pytest.raises(LockError, match=f"in use by process {os.getpid()} on"), locks.held(tmp_path):
                    pass
    assert (tmp_path / ".lock").read_text() == ""


def test_an_exception_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), locks.held(tmp_path):
        _ = 1 / 0
    with locks.held(tmp_path):
        pass


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="finds the open file in /proc")
def test_a_child_process_does_not_keep_the_lock(tmp_path):
    with locks.held(tmp_path):
        links = {file.name: file.readlink() for file in pathlib.Path("/proc/self/fd").iterdir() if file.exists()}
        opened = [int(name) for name, path in links.items() if path == tmp_path / ".lock"]
        child = subprocess.Popen(["sleep", "60"], pass_fds=opened)
    try:
        assert len(opened) == 1
        with locks.held(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_waiting_process_continues_when_the_holder_ends(tmp_path, capsys):
    file = epath.Path(tmp_path) / ".lock"
    with another(tmp_path) as holder:
        child = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
        with locks.flock(file, "the data set", wait=True):
            holder.wait(timeout=20)  # returns only after the holder has ended
        child.wait()
    assert f"the data set: in use by process {holder.pid} on" in capsys.readouterr().out


def test_file_systems_without_locks_are_used_with_a_warning(tmp_path, monkeypatch, caplog):
    """Object stores are used without a lock, too."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with locks.held("gs://no-such-bucket/run"), locks.held("gs://no-such-bucket/run"):
        pass
    monkeypatch.setattr(fcntl, "flock", none)
    with locks.held(tmp_path), locks.held(tmp_path):
        pass
    assert f"{tmp_path}: not locked, its file system has no locks (No locks available)" in caplog.text


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(LockError, match=r"file/run/\.lock: cannot be written \(Not a directory\)")
    with refused, locks.held(tmp_path / "file" / "run"):
        pass


# The commands


def test_two_runs_in_one_workdir(data_dir, tmp_path):
    with another(tmp_path) as holder, pytest.raises(LockError, match=rf"{tmp_path}: in use by process {holder.pid} "):
        train.train(tiny_config(), tmp_path, data_dir)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]  # nothing was touched


def test_two_prepares_of_one_store(data_dir):
    path = store.path_for(data_dir, tiny_config())
    before = {file: file.read_bytes() for file in pathlib.Path(path).rglob("*.json")}
    with another(path) as holder, pytest.raises(LockError, match=rf"{path}: in use by process {holder.pid} "):
        prepare(tiny_config(), data_dir)
    assert {file: file.read_bytes() for file in pathlib.Path(path).rglob("*.json")} == before


def test_all_processes_of_a_run_are_refused(data_dir, tmp_path):
    """Process 0 names the holder and process 1 repeats its message. Neither waits for the other."""
    preset = tmp_path / "preset.json"
    preset.write_text(presets.to_json(tiny_config()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--config={preset}", f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "flaxcap", "train", *flags]
    with another(tmp_path / "run") as holder:
        pair = [
            subprocess.Popen(
                [*command, f"--distributed=127.0.0.1:{port},2,{number}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(2)
        ]
        outputs = [process.communicate(timeout=100)[0] for process in pair]
    refused = f"{tmp_path}/run: in use by process {holder.pid} on"
    assert f"flaxcap train: {refused}" in outputs[0]
    assert f"flaxcap train: process 0 says: {refused}" in outputs[1]
    assert [process.returncode for process in pair] == [1, 1]
