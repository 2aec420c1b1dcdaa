"""The kernels of one dispatch by device time, from a trace of JAX's profiler."""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.profiler import ProfileData

from flaxcap.bench import train
from flaxcap.bench.base import BenchArgs
from flaxcap.config import Config
from flaxcap.encoders import base as encoders

TOP = 15


def profile(config: Config, images: int) -> dict[str, Any]:
    """Runs a dispatch twice, the second time with a trace.

    Returns:
      `device_ms`, `dispatch_ms` (on the host), `steps`, `events`, and `kernels`: name, ms, share and count of the `TOP`
      kernels of the longest total time.
    """
    encoder = encoders.make(config.encoder)
    steps = config.train.steps_per_dispatch
    args = BenchArgs(images, steps, 0, 1, encoder.positions, encoder.features)
    with train.benchmark(config, args) as benchmark, tempfile.TemporaryDirectory() as folder:
        benchmark.repeat()
        with jax.profiler.trace(folder):
            figures = benchmark.repeat()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        events = list(_events(file))
        found = top(events)
    if not events:
        raise RuntimeError("the profiler recorded no kernel")
    return found | {
        "steps": benchmark.facts["steps"],
        "dispatch_ms": 1e3 * figures["seconds"],
        "facts": benchmark.facts,
    }


def _events(file: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Yields the name and the ms of each kernel, or of each of XLA's operations on a CPU."""
    planes = list(ProfileData.from_file(str(file)).planes)
    for plane in planes:
        if not plane.name.startswith("/device:"):
            continue
        lines = list(plane.lines)
        # A GPU has a line for each stream, a TPU one for operations. The other lines group the same times.
        streams = [line for line in lines if line.name.startswith("Stream")] or [
            line for line in lines if line.name == "XLA Ops"
        ]
        yield from ((event.name, event.duration_ns / 1e6) for line in streams for event in line.events)
    if not any(plane.name.startswith("/device:") for plane in planes):
        for event in (e for plane in planes for line in plane.lines for e in line.events):
            loops = event.name.startswith(("while", "call", "conditional"))  # they contain other operations
            if not loops and not event.name.startswith("end: ") and "hlo_op" in dict(event.stats):
                yield event.name, event.duration_ns / 1e6


def top(events: list[tuple[str, float]]) -> dict[str, Any]:
    """Returns the total time, and the kernels of the longest total time."""
    spent: dict[str, list[float]] = {}
    for name, ms in events:
        spent.setdefault(name, []).append(ms)
    total = sum(ms for _, ms in events)
    longest = sorted(spent, key=lambda name: -sum(spent[name]))[:TOP]
    kernels = [
        {"name": name, "ms": sum(spent[name]), "share": sum(spent[name]) / (total or 1), "count": len(spent[name])}
        for name in longest
    ]
    return {"device_ms": total, "events": len(events), "kernels": kernels}
