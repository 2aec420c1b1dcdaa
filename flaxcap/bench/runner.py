"""Runs a benchmark, compares it with baselines, and reports the figures."""

import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flaxcap import config as config_lib
from flaxcap.bench import decode, extract, inputs, machine, score, self_critical, train
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, flat, medians
from flaxcap.bench.baselines import Baseline
from flaxcap.encoders import base as encoders
from flaxcap.errors import UserError, nearest
from flaxcap.runtime import progress

BENCHMARKS: dict[str, Callable[[config_lib.Config, BenchArgs], AbstractContextManager[Benchmark]]] = {
    "train": train.benchmark,
    "decode": decode.benchmark,
    "extract": extract.benchmark,
    "input": inputs.benchmark,
    "score": score.benchmark,
    "self_critical": self_critical.benchmark,
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
    peak: bool = True,
) -> dict[str, Any]:
    """Measures, and prints a table and a line of JSON.

    Args:
      what: a name in `BENCHMARKS`.
      config: of the models and of training.
      images: images of the synthetic data set.
      steps: timed steps of a repetition.
      warmup: steps before the first repetition.
      repeats: repetitions.
      workers: threads that decode images.
      against: command lines of baselines. Each runs once after each repetition.
      out: a file that the line of JSON is appended to.
      peak: measures the machine's matrix products too, where the benchmark has floating-point operations to compare.

    Returns:
      The content of the line. It names `what`, `given` and `peers` as the files in `experiments/results` do.

    Raises:
      UserError: the name is unknown, or a baseline cannot be run.
    """
    if what not in BENCHMARKS:
        raise UserError(f"{what}: expected one of {', '.join(BENCHMARKS)}{nearest(what, BENCHMARKS)}")
    baselines = _baselines(against)
    if out:
        _append(out, "")  # A file that cannot be written is an error before anything is measured.
    encoder = encoders.make(config.encoder)
    args = BenchArgs(images, steps, warmup, workers, encoder.positions, encoder.features)
    with BENCHMARKS[what](config, args) as benchmark:
        repetitions, peaks = _repeat(benchmark, what, repeats, baselines, benchmark.peak_dtype if peak else "")
    ours = [figures[benchmark.rate] for figures in repetitions]
    result = {
        "what": what,
        benchmark.rate: statistics.median(ours),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine.describe(),
        "given": {"images": images, "steps": steps, "warmup": warmup, "repeats": repeats},
        "facts": benchmark.facts,
        "median": medians(repetitions),
        "memory": machine.memory(),
        "peers": [baseline.summary(ours) for baseline in baselines],
        "repetitions": repetitions,
        "config": dataclasses.asdict(config),
    }
    if peaks:
        result["peak"] = _peak(benchmark.peak_dtype, peaks, result["median"]["flop_s"])
    _report(result, out)
    return result


def _baselines(commands: Sequence[str]) -> list[Baseline]:
    if commands:
        # By default JAX takes 75% of a GPU's memory at its start, which leaves a baseline too little.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return [Baseline(command) for command in commands]


def _repeat(
    benchmark: Benchmark, what: str, repeats: int, baselines: Sequence[Baseline], peak_dtype: str
) -> tuple[list[Figures], list[dict[str, float]]]:
    """Runs the repetitions, and each baseline after each of them.

    Returns:
      The figures of each repetition, and the machine's peak before, between and after them if the benchmark needs it.
    """
    repetitions: list[Figures] = []
    peaks: list[dict[str, float]] = []

    def peak() -> None:
        if peak_dtype:
            peaks.append(machine.matmul_flop_s(peak_dtype))

    peak()
    for _ in progress.bar(range(repeats), what, "repetitions"):
        load = os.getloadavg()[0]
        repetitions.append(benchmark.repeat() | {"load_before": load})
        peak()
        for baseline in baselines:
            baseline.run()
    return repetitions, peaks


def _peak(dtype: str, peaks: list[dict[str, float]], flop_s: float) -> dict[str, Any]:
    """Returns the machine's peak FLOP/s, and the fraction of it that the benchmark reached."""
    median, best = statistics.median(p["median"] for p in peaks), max(p["best"] for p in peaks)
    return {
        "dtype": dtype,
        "median_flop_s": median,
        "best_flop_s": best,
        "fraction_of_median": flop_s / median,
        "fraction_of_best": flop_s / best,
        "each": peaks,
    }


def _report(result: dict[str, Any], out: str | None) -> None:
    """Prints the table and the line of JSON, and appends the line to a file."""
    for line in table(result):
        print(line)
    line = json.dumps(result)
    print(line)
    if out:
        _append(out, line + "\n")


def _append(out: str, text: str) -> None:
    file = pathlib.Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(text)


def table(result: dict[str, Any]) -> list[str]:
    """Returns lines with the median, minimum and maximum of each figure over the repetitions, then the other facts."""
    device, cpu, versions = result["device"], result["cpu"], result["versions"]
    repetitions = [flat(figures) for figures in result["repetitions"]]
    rows = [("", "median", "min", "max")]

    def row(name: str, median: float, low: float, high: float) -> None:
        rows.append((name, _number(median), _number(low), _number(high)))

    for name, value in flat(result["median"]).items():
        column = [figures[name] for figures in repetitions]
        row(name, value, min(column), max(column))
    for baseline in result["peers"]:
        ratio = baseline["ratio"]
        row("baseline", baseline["rate"], min(baseline["rates"]), max(baseline["rates"]))
        row("times as fast", ratio["median"], ratio["min"], ratio["max"])
    once = flat(result["facts"]) | flat(result["memory"])
    if "peak" in result:
        once |= {f"peak.{name}": value for name, value in result["peak"].items() if name != "each"}
    width = max(len(name) for name in (*(row[0] for row in rows), *once))
    lines = [
        f"{result['what']}: {device['count']} x {device['kind']} ({device['platform']}); {cpu['model']},"
        f" {cpu['usable_cores']} of {cpu['cores']} cores; JAX {versions['jax']}, Python {versions['python']}"
    ]
    lines += [f"against {baseline['command']}" for baseline in result["peers"]]
    lines += [f"{name:{width}}  {median:>10}  {low:>10}  {high:>10}" for name, median, low, high in rows]
    return lines + [f"{name:{width}}  {_number(value):>10}" for name, value in once.items()]


def _number(value: object) -> str:
    """Returns a number with four digits, and T, G or M for large ones."""
    if not isinstance(value, int | float):
        return str(value)
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
