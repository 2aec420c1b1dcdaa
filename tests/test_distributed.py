"""Two processes on JAX's own runtime train and save as one process with as many devices does."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny_store import tiny_config, write_store

from flaxcap import logs, presets

RUN = "from flaxcap.main import run; run()"


@pytest.fixture
def start():
    """Starts programs on so many devices each; those that a failed test leaves waiting for each other are ended."""
    started: list[subprocess.Popen] = []

    def start(args: list[str], devices: int) -> subprocess.Popen:
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", RUN, *args]
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
    """(preset file, data_dir)"""
    path = tmp_path_factory.mktemp("distributed")
    config = tiny_config(epochs=2)
    write_store(path / "data", config)
    (path / "preset.json").write_text(presets.to_json(config))
    return path / "preset.json", path / "data"


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["val/loss"] for line in logs.read(workdir) if "val/loss" in line]


def scores(workdir: pathlib.Path) -> list[float]:
    return [line["val/cider"] for line in logs.read(workdir) if "val/cider" in line]


RECIPE = ["dropout.output=0.2", "ema=0.5", "scheduled_sampling=0.5", "doubly_stochastic=0.5", "label_smoothing=0.1"]


@pytest.mark.parametrize(
    ("features", "recipe", "stages"),
    [
        ("device", [], ["epochs=1", "epochs=2"]),
        ("stream", [], ["epochs=1", "epochs=2"]),
        # A step a dispatch: how long the drawn captions are differs between the processes.
        ("stream", ["epochs=2", "steps_per_dispatch=1", *RECIPE], ["cider_epochs=0", "cider_epochs=1"]),
    ],
    ids=["device", "stream", "recipe"],
)
def test_two_processes_train_save_and_resume_as_one(prepared, start, tmp_path, features, recipe, stages):
    """Also where they draw masks and captions: each those of its own images."""
    preset, data_dir = prepared
    options = [f"--config.train.{field}" for field in (f"features={features}", "schedule=constant", *recipe)]
    alone = start(train_args(preset, data_dir, tmp_path / "one", *options, f"--config.train.{stages[-1]}"), devices=4)
    out = ""
    for stage in stages:  # the second time they go on with their own checkpoint
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        args = train_args(preset, data_dir, tmp_path / "two", *options, f"--config.train.{stage}")
        pair = [start([*args, f"--distributed=127.0.0.1:{port},2,{n}"], devices=2) for n in range(2)]
        for process in pair:
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out
    assert "going on at step" in out
    out, _ = alone.communicate(timeout=200)
    assert alone.returncode == 0, out
    assert len(losses(tmp_path / "one")) == 2 + ("cider_epochs=1" in stages)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    np.testing.assert_allclose(scores(tmp_path / "two"), scores(tmp_path / "one"), rtol=1e-5)
