"""The parts that all benchmarks share: their arguments, what they return, and statistics of figures."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Figures = dict[str, Any]  # numbers by name, nested in groups


class BenchArgs(NamedTuple):
    """The command line's arguments to every benchmark."""

    images: int  # in the synthetic data set
    steps: int  # timed in each repetition
    warmup: int  # steps before the first repetition
    workers: int  # threads that decode images
    positions: int  # P, of the preset's encoder
    feature_dim: int  # F


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark that is compiled, warm and ready to be repeated."""

    rate: str  # the name of the figure that baselines are compared with
    facts: Figures  # known before the first repetition
    repeat: Callable[[], Figures]
    peak_dtype: str = ""  # dtype whose peak rate of matrix products is measured; empty: none


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Returns the median and the 10th and 90th percentiles."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def rates(seconds: float, **counts: float) -> dict[str, float]:
    """Returns each count divided by the seconds: `captions=8` gives `{"captions_s": ...}`."""
    return {f"{name}_s": count / seconds for name, count in counts.items()}


def medians(repetitions: Sequence[Figures]) -> Figures:
    """Returns the median of each figure over the repetitions."""
    found: Figures = {}
    for name, value in repetitions[0].items():
        column = [figures[name] for figures in repetitions]
        found[name] = medians(column) if isinstance(value, dict) else statistics.median(column)
    return found


def flat(figures: Figures, prefix: str = "") -> dict[str, Any]:
    """Joins the names of nested figures: `{"step_ms": {"median": 1}}` gives `{"step_ms.median": 1}`."""
    found = {}
    for name, value in figures.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
