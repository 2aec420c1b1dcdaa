"""A small prepared store, short runs on it, and the comparison of two runs."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from flaxcap import presets
from flaxcap.config import Config, Data, Decode, Dropout, Encoder, Model, Shapes, Train
from flaxcap.training import logs


def small_config() -> Config:
    """Returns the preset of a short run with an average, noise, and a schedule that follows the score."""
    return Config(
        dataset="shapes",
        data=Data(shapes=Shapes(num_train=96, num_val=16, num_test=8)),
        encoder=Encoder(weights="random", block="mixed0", image_size=160, batch_size=8, shard_images=32),
        model=Model(image_dim=32, embedding_dim=32, attention_dim=32, hidden_dim=64, head_dim=32),
        train=Train(
            batch_images=8,
            captions_per_image=2,
            epochs=6,
            cider_epochs=2,
            learning_rate=5e-3,
            warmup_steps=5,
            schedule="plateau",
            plateau_epochs=1,
            num_buckets=2,
            log_every=5,
            checkpoint_every=7,
            ema=0.9,
            dropout=Dropout(output=0.2, recurrent=0.1),
            scheduled_sampling=0.3,
        ),
        decode=Decode(max_length=16, batch_size=8),
    )


class Workbench:
    """A prepared store, and commands on it. Each command is a process of its own."""

    def __init__(self, scratch: pathlib.Path, config: Config | None = None):
        self.config = config or small_config()
        self.data_dir, self._preset = scratch / "data", scratch / "preset.json"
        self._preset.write_text(presets.to_json(self.config))
        self._cache = scratch / "compiled"
        done = self.start("prepare")
        out, _ = done.communicate()
        if done.returncode:
            raise RuntimeError(out)

    def start(self, *args: str, devices: int = 1) -> subprocess.Popen:
        """Starts a command of flaxcap on this many simulated devices."""
        command, *rest = args
        given = [f"--config={self._preset}", f"--data_dir={self.data_dir}", f"--compilation_cache_dir={self._cache}"]
        env = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
        }
        line = [sys.executable, "-m", "flaxcap", command, *given, *rest]
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def train(self, workdir: pathlib.Path, *more: str, devices: int = 1) -> subprocess.Popen:
        return self.start("train", f"--workdir={workdir}", *more, devices=devices)

    def pair(self, workdir: pathlib.Path, *more: str, devices: int = 1) -> list[subprocess.Popen]:
        """Starts one training run of two processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ids = [f"--distributed=127.0.0.1:{port},2,{n}" for n in range(2)]
        return [self.train(workdir, *more, number, devices=devices) for number in ids]

    def finish(self, workdir: pathlib.Path, *more: str, devices: int = 1) -> None:
        """Trains to the end.

        Raises:
          RuntimeError: the run failed.
        """
        process = self.train(workdir, *more, devices=devices)
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(out)


def result(name: str, tried: int, lost: list[str], **figures: float) -> dict:
    """Returns a case's result. `lost` has one line for each failed try."""
    return {"case": name, "tried": tried, "survived": tried - len(lost), "lost": lost, **figures}


def times(scale: float, count: int) -> int:
    """Returns `count` tries times the scale, at least one."""
    return max(1, round(scale * count))


def newest(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array of the newest checkpoint by its path."""
    step = max((int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), default=None)
    if step is None:
        raise RuntimeError(f"{workdir}: no checkpoint")
    found, here = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "rest"):
        path = workdir / "checkpoints" / str(step) / item
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), tree)
            for name, x in jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, like)):
                found[f"{step}/{item}{jax.tree_util.keystr(name)}"] = np.asarray(x)
    return found


def lines(workdir: pathlib.Path) -> list[dict]:
    """Returns the lines of a run's log without their rates, which differ from run to run."""
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in logs.read(workdir)]


def differences(workdir: pathlib.Path, undisturbed: pathlib.Path, label: str) -> list[str]:
    """Returns what is not bit-equal between a run and an undisturbed one, as lines that begin with `label`."""
    ours, theirs = newest(workdir), newest(undisturbed)
    if ours.keys() != theirs.keys():
        return [f"{label}: other arrays: {sorted(ours.keys() ^ theirs.keys())[:3]}"]
    wrong = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    found = [f"{label}: {len(wrong)} arrays differ, {wrong[0]} first"] if wrong else []
    if lines(workdir) != lines(undisturbed):
        found.append(f"{label}: another metrics.jsonl")
    return found
