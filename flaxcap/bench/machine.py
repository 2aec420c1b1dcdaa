"""Describes the machine that a figure was measured on, and measures its matrix products."""

import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxcap
from flaxcap.runtime import devices as devices_lib

# Rows, inner, columns: a square, and the products of the image projection and of the vocabulary at default sizes.
SHAPES = ((2048, 2048, 2048), (4096, 2048, 256), (1024, 512, 5001))
LARGE = ((4096, 4096, 4096), (8192, 8192, 8192))  # an accelerator reaches its peak only with large matrices
ROUNDS, ROUND_S = 7, 0.02


def describe() -> dict[str, Any]:
    """Returns devices, CPU, and versions of Python and of libraries."""
    device = jax.devices()[0]
    return {
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": devices_lib.usable_cores()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "numpy")},
            "flaxcap": flaxcap.__version__,
        },
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or no such line, as on ARM
        return platform.processor() or platform.machine()


def memory() -> dict[str, float]:
    """Returns the peak memory so far, in GB, of this process, and of a device if the device reports it."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    stats: Callable = jax.local_devices()[0].memory_stats
    peak = (stats() or {}).get("peak_bytes_in_use")
    return found | ({"device_peak_gb": peak / 1e9} if peak else {})


def matmul_flop_s(dtype: str, shapes: tuple[tuple[int, int, int], ...] = ()) -> dict[str, float]:
    """Measures jitted matrix products at JAX's default precision, as in the models, with sums in float32.

    Args:
      dtype: of the matrices.
      shapes: rows, inner size and columns of each product; default: `SHAPES`, on an accelerator also `LARGE`.

    Returns:
      The median and the best FLOP/s of the best shape, times the number of devices. A CPU counts as one device, even
      where JAX divides it into several.
    """
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    found = [_matmul(m, k, n, dtype) for m, k, n in shapes or SHAPES + (() if on_cpu else LARGE)]
    devices = 1 if on_cpu else jax.device_count()
    return {"median": devices * max(median for median, _ in found), "best": devices * max(best for _, best in found)}


def _matmul(rows: int, inner: int, columns: int, dtype: str) -> tuple[float, float]:
    """Returns the median and the best FLOP/s of `ROUNDS` rounds on one device."""
    keys = jax.random.split(jax.random.key(0))
    left = jax.random.normal(keys[0], (rows, inner), jnp.dtype(dtype))
    right = jax.random.normal(keys[1], (inner, columns), jnp.dtype(dtype))
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))

    def seconds(calls: int) -> float:
        begin = time.perf_counter()
        out = None
        for _ in range(calls):  # queued together, so that the cost of a call on the host is hidden
            out = multiply(left, right)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    seconds(1)  # compiles
    calls = max(1, int(ROUND_S / seconds(1)))
    rounds = [2 * rows * inner * columns / seconds(calls) for _ in range(ROUNDS)]
    return float(np.median(rounds)), max(rounds)
