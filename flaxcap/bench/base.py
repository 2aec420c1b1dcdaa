"""What a benchmark is: something to repeat, and how its figures are summed up."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Figures = dict[str, Any]  # numbers by name, in groups


class Given(NamedTuple):
    """What the command line asks of every benchmark."""

    images: int  # made up
    steps: int  # timed, in each repetition
    warmup: int  # steps before the first repetition
    workers: int  # threads that decode pictures
    positions: int  # of the preset's encoder
    feature_dim: int


@dataclasses.dataclass(frozen=True)
class Work:
    """A benchmark that is ready: compiled and warm."""

    rate: str  # the figure by which it is compared
    facts: Figures  # what is known before the first repetition
    repeat: Callable[[], Figures]
    peak_dtype: str = ""  # of the matrix products that the machine's peak is measured by; empty: none is


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Their median, and what a tenth of them is under (p10) and over (p90)."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def rates(seconds: float, **counts: float) -> dict[str, float]:
    """How many of each thing a second: {"captions_s": ...} of `captions=...`."""
    return {f"{name}_s": count / seconds for name, count in counts.items()}


def medians(repetitions: Sequence[Figures]) -> Figures:
    """Each number's median over the repetitions."""
    found: Figures = {}
    for name, value in repetitions[0].items():
        column = [figures[name] for figures in repetitions]
        found[name] = medians(column) if isinstance(value, dict) else statistics.median(column)
    return found


def flat(figures: Figures, prefix: str = "") -> dict[str, Any]:
    """{"step_ms.median": ...} of {"step_ms": {"median": ...}}."""
    found = {}
    for name, value in figures.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
