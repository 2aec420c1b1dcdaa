"""Several processes train, save and end as one process does, or end with an error that names the cause."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from command import QUICK_TO_COMPILE
from tiny_store import tiny_config, write_store

from flaxcap import presets
from flaxcap.training import logs


@pytest.fixture
def start():
    """Starts programs with some devices each. At the end it kills programs that still wait for each other."""
    started: list[subprocess.Popen] = []

    def start(args: list[str], devices: int) -> subprocess.Popen:
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "flaxcap", *args]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def train_args(preset: pathlib.Path, data_dir: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    return ["train", f"--config={preset}", f"--data_dir={data_dir}", f"--workdir={workdir}", *more]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The file of a preset, and a data_dir with its store."""
    path = tmp_path_factory.mktemp("distributed")
    config = tiny_config(epochs=2)
    write_store(path / "data", config)
    (path / "preset.json").write_text(presets.to_json(config))
    return path / "preset.json", path / "data"


def start_pair(start, args: list[str], devices: int = 2) -> list[subprocess.Popen]:
    """Starts the same command as two processes with `devices` devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start([*args, f"--distributed=127.0.0.1:{port},2,{n}"], devices) for n in range(2)]


def until(process: subprocess.Popen, text: str) -> None:
    """Reads the output up to a line that contains the text."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} is not in the output: {''.join(lines)}")


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["val/loss"] for line in logs.read(workdir) if "val/loss" in line]


def scores(workdir: pathlib.Path) -> list[float]:
    return [line["val/cider"] for line in logs.read(workdir) if "val/cider" in line]


RECIPE = ["dropout.output=0.2", "ema=0.5", "scheduled_sampling=0.5", "doubly_stochastic=0.5", "label_smoothing=0.1"]


@pytest.mark.parametrize(
    ("features", "recipe", "stages"),
    [
        ("device", [], ["epochs=1", "epochs=2"]),
        # One step a dispatch: the lengths of sampled captions differ between the processes.
        ("stream", ["epochs=2", "steps_per_dispatch=1", *RECIPE], ["cider_epochs=0", "cider_epochs=1"]),
    ],
    ids=["device", "recipe"],
)
def test_two_processes_train_save_and_resume_as_one(prepared, start, tmp_path, features, recipe, stages):
    """Each process draws the noise and samples the captions of its own images."""
    preset, data_dir = prepared
    options = [f"--config.train.{field}" for field in (f"features={features}", "schedule=constant", *recipe)]
    alone = start(train_args(preset, data_dir, tmp_path / "one", *options, f"--config.train.{stages[-1]}"), devices=4)
    out = ""
    for stage in stages:  # the second time they resume their own checkpoint
        args = train_args(preset, data_dir, tmp_path / "two", *options, f"--config.train.{stage}")
        for process in start_pair(start, args):
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out
    assert "resumes at step" in out
    out, _ = alone.communicate(timeout=200)
    assert alone.returncode == 0, out
    assert len(losses(tmp_path / "one")) == 2 + ("cider_epochs=1" in stages)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    np.testing.assert_allclose(scores(tmp_path / "two"), scores(tmp_path / "one"), rtol=1e-5)


def test_after_a_sigterm_to_one_process_both_save_the_same_step(prepared, start, tmp_path):
    preset, data_dir = prepared
    args = train_args(preset, data_dir, tmp_path / "run", "--config.train.schedule=constant")
    pair = start_pair(start, [*args, "--config.train.epochs=100000"])
    until(pair[0], "epoch 2:")
    pair[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in pair]
    assert [process.returncode for process in pair] == [75, 75], outputs
    steps = {out.rpartition("saved at step ")[2].split()[0] for out in outputs}
    assert len(steps) == 1, outputs
    # One process with another number of devices resumes there.
    (step,) = steps
    epochs = max(line.get("epoch", 0) for line in logs.read(tmp_path / "run")) + 1
    alone = start([*args, f"--config.train.epochs={epochs}"], devices=1)
    out, _ = alone.communicate(timeout=200)
    assert alone.returncode == 0, out
    assert f"resumes at step {step}" in out
    assert max(line.get("epoch", 0) for line in logs.read(tmp_path / "run")) == epochs


def test_when_a_process_dies_the_other_ends_with_an_error_and_both_can_resume(prepared, start, tmp_path):
    preset, data_dir = prepared
    args = train_args(preset, data_dir, tmp_path / "run", "--config.train.schedule=constant")
    first, second = start_pair(start, [*args, "--config.train.epochs=100000"])
    until(first, "epoch 2:")
    second.kill()
    out, _ = first.communicate(timeout=120)
    assert first.returncode not in (0, 75), out
    assert "start all processes again with the same command" in out
    epochs = max(line.get("epoch", 0) for line in logs.read(tmp_path / "run")) + 1
    for process in start_pair(start, [*args, f"--config.train.epochs={epochs}"]):
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
    assert "resumes at step" in out


def test_a_run_resumes_with_any_number_of_devices_and_processes(prepared, start, tmp_path):
    """The batches are equal, and the numbers up to rounding."""
    preset, data_dir = prepared
    # Scheduled sampling depends on the number of epochs.
    recipe = [field for field in RECIPE if "scheduled" not in field]
    options = ["--config.train.schedule=constant", *(f"--config.train.{field}" for field in recipe)]
    plain = start(train_args(preset, data_dir, tmp_path / "plain", *options, "--config.train.epochs=3"), devices=8)
    for epochs, devices, processes in ((1, 8, 1), (2, 1, 2), (3, 2, 1)):
        args = train_args(preset, data_dir, tmp_path / "run", *options, f"--config.train.epochs={epochs}")
        started = start_pair(start, args, devices) if processes == 2 else [start(args, devices)]
        for process in started:
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out
    out, _ = plain.communicate(timeout=200)
    assert plain.returncode == 0, out
    assert len(losses(tmp_path / "plain")) == 3
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=1e-5)
    np.testing.assert_allclose(scores(tmp_path / "run"), scores(tmp_path / "plain"), rtol=1e-5)
