"""`flaxcap bench`: how fast this machine trains, decodes, extracts, feeds and scores, beside other programs."""

import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tqdm

from flaxcap import config as config_lib
from flaxcap.bench import decode, extract, inputs, machine, score, train
from flaxcap.bench.base import Figures, Given, Work, flat, medians
from flaxcap.bench.baselines import Peer
from flaxcap.encoders import base as encoders
from flaxcap.errors import UserError, nearest

WORKS: dict[str, Callable[[config_lib.Config, Given], AbstractContextManager[Work]]] = {
    "train": train.work,
    "decode": decode.work,
    "extract": extract.work,
    "input": inputs.work,
    "score": score.work,
}


def bench(
    what: str,
    config: config_lib.Config,
    *,
    images: int,
    steps: int,
    warmup: int,
    repeats: int,
    workers: int,
    against: Sequence[str] = (),
    out: str | None = None,
) -> dict[str, Any]:
    """Measures `what`, prints a table and a line of JSON, and returns what is in that line.

    A peer of `against` runs once after each of our repetitions. The line is also appended to the file `out`.
    """
    if what not in WORKS:
        raise UserError(f"{what}: expected one of {', '.join(WORKS)}{nearest(what, WORKS)}")
    peers = [Peer(command) for command in against]
    if peers:
        # JAX would take most of a GPU's memory at once, and leave a peer too little.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if out:
        _append(out, "")  # what cannot be written is told before anything is measured
    encoder = encoders.make(config.encoder)
    given = Given(images, steps, warmup, workers, encoder.positions, encoder.features)
    repetitions: list[Figures] = []
    peaks: list[dict[str, float]] = []
    with WORKS[what](config, given) as work:

        def peak() -> None:
            if work.peak_dtype:
                peaks.append(machine.matmul_flop_s(work.peak_dtype))

        peak()
        for _ in tqdm.trange(repeats, desc=what, unit=" repetitions", disable=None):
            load = os.getloadavg()[0]
            repetitions.append(work.repeat() | {"load_before": load})
            peak()
            for peer in peers:
                peer.run()
        facts, rate = work.facts, work.rate
    ours = [figures[rate] for figures in repetitions]
    result = {
        "what": what,
        rate: statistics.median(ours),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine.describe(),
        "given": {"images": images, "steps": steps, "warmup": warmup, "repeats": repeats},
        "facts": facts,
        "median": medians(repetitions),
        "memory": machine.memory(),
        "peers": [peer.summary(ours) for peer in peers],
        "repetitions": repetitions,
        "config": dataclasses.asdict(config),
    }
    if peaks:
        result["peak"] = _peak(work.peak_dtype, peaks, result["median"]["flop_s"])
    for line in table(result):
        print(line)
    line = json.dumps(result)
    print(line)
    if out:
        _append(out, line + "\n")
    return result


def _peak(dtype: str, peaks: list[dict[str, float]], flop_s: float) -> dict[str, Any]:
    """The machine's matrix products, measured between the repetitions, and which share of them was reached."""
    median, best = statistics.median(p["median"] for p in peaks), max(p["best"] for p in peaks)
    return {
        "dtype": dtype,
        "median_flop_s": median,
        "best_flop_s": best,
        "fraction_of_median": flop_s / median,
        "fraction_of_best": flop_s / best,
        "each": peaks,
    }


def _append(out: str, text: str) -> None:
    file = pathlib.Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(text)


def table(result: dict[str, Any]) -> list[str]:
    """What a reader wants of a result: each figure's median, lowest and highest of the repetitions."""
    device, cpu, versions = result["device"], result["cpu"], result["versions"]
    repetitions = [flat(figures) for figures in result["repetitions"]]
    rows = [("", "median", "min", "max")]

    def row(name: str, median: float, low: float, high: float) -> None:
        rows.append((name, _number(median), _number(low), _number(high)))

    for name, value in flat(result["median"]).items():
        column = [figures[name] for figures in repetitions]
        row(name, value, min(column), max(column))
    for peer in result["peers"]:
        ratio = peer["ratio"]
        row("peer", peer["rate"], min(peer["rates"]), max(peer["rates"]))
        row("times as fast", ratio["median"], ratio["min"], ratio["max"])
    once = flat(result["facts"]) | flat(result["memory"])
    if "peak" in result:
        once |= {f"peak.{name}": value for name, value in result["peak"].items() if name != "each"}
    width = max(len(name) for name in (*(row[0] for row in rows), *once))
    lines = [
        f"{result['what']}: {device['count']} x {device['kind']} ({device['platform']}); {cpu['model']},"
        f" {cpu['usable_cores']} of {cpu['cores']} cores; JAX {versions['jax']}, Python {versions['python']}"
    ]
    lines += [f"against {peer['command']}" for peer in result["peers"]]
    lines += [f"{name:{width}}  {median:>10}  {low:>10}  {high:>10}" for name, median, low, high in rows]
    return lines + [f"{name:{width}}  {_number(value):>10}" for name, value in once.items()]


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return str(value)
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
