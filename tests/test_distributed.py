"""Two processes on JAX's own runtime train and save as one process with as many devices does."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny_store import tiny_config, write_store

from flaxcap import config as config_lib
from flaxcap import logs

RUN = "from flaxcap.main import run; run()"


def start(args: list[str], devices: int, **popen) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def train_args(preset: pathlib.Path, data_dir: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    return ["train", f"--config={preset}", f"--data_dir={data_dir}", f"--workdir={workdir}", *more]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(preset file, data_dir)"""
    path = tmp_path_factory.mktemp("distributed")
    config = tiny_config(epochs=2)
    write_store(path / "data", config)
    (path / "preset.json").write_text(config_lib.to_json(config))
    return path / "preset.json", path / "data"


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["val/loss"] for line in logs.read(workdir) if "val/loss" in line]


@pytest.mark.parametrize("features", ["device", "stream"])
def test_two_processes_train_save_and_resume_as_one(prepared, tmp_path, features):
    preset, data_dir = prepared
    options = [f"--config.train.features={features}", "--config.train.schedule=constant"]
    alone = start(train_args(preset, data_dir, tmp_path / "one", *options), devices=4)
    out = ""
    for epochs in (1, 2):  # the second time they go on with their own checkpoint
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        args = train_args(preset, data_dir, tmp_path / "two", *options, f"--config.train.epochs={epochs}")
        pair = [start([*args, f"--distributed=127.0.0.1:{port},2,{n}"], devices=2) for n in range(2)]
        for process in pair:
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out
    assert "going on at step" in out
    out, _ = alone.communicate(timeout=200)
    assert alone.returncode == 0, out
    assert len(losses(tmp_path / "one")) == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
