"""The measurements in their order, and their records on disk. Nothing here imports JAX, which would take the device."""

import json
import pathlib
from typing import Any, NamedTuple

from etils import epath

from flaxcap.files import integrity

DONE, FAILED, TIMEOUT, SKIPPED, INTERRUPTED = "done", "failed", "timeout", "skipped", "interrupted"
Record = dict[str, Any]


class Measurement(NamedTuple):
    """A measurement and its time limits, for full sizes."""

    name: str
    least: int  # seconds that must be left to start it
    most: int  # seconds that it may take
    needs_torch: bool = False


# Cheap and certain ones first. The last ones compile the most or need the most memory.
MEASUREMENTS = (
    Measurement("machine", 10, 60),
    Measurement("train_bf16_1024", 30, 180),
    Measurement("decode_greedy", 20, 90),
    Measurement("gradients", 20, 90),
    Measurement("train_bf16_256", 25, 100),
    Measurement("self_critical", 25, 90),
    Measurement("extract", 25, 100),
    Measurement("decode_beam5", 20, 100),
    Measurement("profile", 20, 70),
    Measurement("torch_decode", 25, 90, True),
    Measurement("torch_train_eager", 40, 120, True),
    Measurement("train_streamed_1024", 25, 90),
    Measurement("train_f32_1024", 30, 100),
    Measurement("train_bf16_2048", 30, 100),
    Measurement("torch_train_compiled", 50, 180, True),
)
TINY_LEAST = 5  # seconds that must be left to start a measurement of --tiny


def write(file: pathlib.Path, record: Record) -> None:
    """Writes a record atomically."""
    write_text(file, json.dumps(record, indent=1) + "\n")


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes a file atomically."""
    integrity.write_atomically(epath.Path(file), text)


def read(file: pathlib.Path) -> Record | None:
    """Returns a record, or None if there is none or it cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def records(out: pathlib.Path) -> list[Record]:
    """Returns the records of a directory in the order of the measurements."""
    found = (read(out / f"{each.name}.json") for each in MEASUREMENTS)
    return [record for record in found if record]
