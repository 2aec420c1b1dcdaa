"""Programs run as users run them, with their peak memory, and a small trained model that they make."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

from flaxcap import presets
from flaxcap.config import Config, Data, Decode, Encoder, Model, Shapes, Train

ENCODER = Encoder(weights="random", block="mixed0", image_size=160, batch_size=8, shard_images=256)


class Ended(NamedTuple):
    """The result of a program."""

    status: int  # as Popen has it, negative for a signal
    out: str
    err: str
    memory: float  # peak, in MB
    seconds: float


def run(*command: object, within_s: float = 3600, **environment: str) -> Ended:
    """Runs a command in a process of its own.

    Args:
      command: program and arguments.
      within_s: seconds after which the process is killed. Its status is then -9.
      environment: further environment variables.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1"} | environment
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=out, stderr=err)
        memory = 0.0
        while process.poll() is None:
            # wait4's ru_maxrss would not do: on Linux it includes the memory of the parent before exec.
            memory = max(memory, peak_mb(process.pid))
            if time.monotonic() - begin > within_s:
                process.kill()
            time.sleep(0.02)
        output, errors = (_all_of(file) for file in (out, err))
    return Ended(process.returncode, output, errors, memory, time.monotonic() - begin)


def peak_mb(pid: int | str = "self") -> float:
    """Returns the peak memory of a running process, as Linux reports it. Returns 0 if the process has ended."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def _all_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="surrogateescape")


def flaxcap(*args: object, within_s: float = 3600, **environment: str) -> Ended:
    """Runs flaxcap."""
    return run(sys.executable, "-m", "flaxcap", *args, within_s=within_s, **environment)


def succeed(*args: object) -> Ended:
    """Runs flaxcap.

    Raises:
      RuntimeError: it failed.
    """
    ended = flaxcap(*args)
    if ended.status:
        raise RuntimeError(f"flaxcap {' '.join(map(str, args))}: status {ended.status}\n{ended.err[-2000:]}")
    return ended


def write_preset(file: pathlib.Path, config: Config) -> pathlib.Path:
    file.write_text(presets.to_json(config))
    return file


def model(scratch: pathlib.Path) -> pathlib.Path:
    """Makes an export of a decoder that was trained for a few seconds."""
    config = Config(
        dataset="shapes",
        data=Data(shapes=Shapes(num_train=32, num_val=8, num_test=0), test_split=""),
        encoder=ENCODER,
        model=Model(image_dim=16, embedding_dim=16, attention_dim=16, hidden_dim=32, head_dim=32),
        train=Train(batch_images=8, captions_per_image=1, epochs=2, learning_rate=2e-2, warmup_steps=5, num_buckets=1),
        decode=Decode(max_length=16, batch_size=8),
    )
    preset = f"--config={write_preset(scratch / 'model.json', config)}"
    data, run_dir, out = (scratch / name for name in ("model-data", "model-run", "model"))
    succeed("prepare", preset, f"--data_dir={data}")
    succeed("train", preset, f"--data_dir={data}", f"--workdir={run_dir}")
    succeed("export", f"--data_dir={data}", f"--workdir={run_dir}", f"--out={out}")
    return out
