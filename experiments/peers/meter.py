"""Times the steps of a script and prints the line of JSON that `flaxcap bench --against` reads."""

import json
import os
import resource
import statistics
import time


class Meter:
    """Wall time of each step, and the figures made from them."""

    def __init__(self, baseline: str, setting: str, unit: str = "captions", **facts: object):
        """Records what is measured.

        Args:
            baseline: the library, as in "torch".
            setting: model, padding and options, in words.
            unit: what a step counts: "captions" or "images".
            facts: further entries of the JSON line, such as the library's version.
        """
        self._unit = unit
        self._record = {"baseline": baseline, "setting": setting, **facts}
        self._steps: list[tuple[float, int, int]] = []

    def start(self) -> None:
        """Begins the first timed step."""
        self._record["load_before"] = round(os.getloadavg()[0], 2)
        self._last = time.perf_counter()

    def step(self, count: int, tokens: int = 0) -> None:
        """Ends a step that processed `count` captions or images, and begins the next one."""
        now = time.perf_counter()
        self._steps.append((now - self._last, count, tokens))
        self._last = time.perf_counter()

    def finish(self, **more: object) -> None:
        """Prints the line of JSON.

        The rate is the mean count of a step divided by the median time of a step. The median ignores the few steps
        that other work on the machine slowed down, which favours the baseline. `…_s_mean` is the plain quotient.
        """
        seconds, counts, tokens = (list(column) for column in zip(*self._steps, strict=True))
        median, steps = statistics.median(seconds), len(seconds)
        self._record |= {
            "steps": steps,
            "step_ms": round(1e3 * median, 2),
            "step_ms_min": round(1e3 * min(seconds), 2),
            "step_ms_p90": round(1e3 * sorted(seconds)[int(0.9 * (steps - 1))], 2),
            f"{self._unit}_s": round(sum(counts) / steps / median, 2),
            f"{self._unit}_s_mean": round(sum(counts) / sum(seconds), 2),
            "tokens_s": round(sum(tokens) / steps / median, 1),
            "process_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "when": time.strftime("%Y-%m-%dT%H:%M:%S"),
            **more,
        }
        print(json.dumps(self._record), flush=True)
