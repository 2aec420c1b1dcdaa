"""Describes the accelerator: driver, versions, precision, and the rate of matrix products."""

import contextlib
import importlib.metadata
import os
import subprocess
import typing

import jax

from flaxcap.bench import machine
from flaxcap.runtime import device_memory

PACKAGES = ("flax", "optax", "orbax-checkpoint", "tensorstore", "pillow", "torch")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def describe(products: tuple[tuple[int, int, int], ...]) -> dict[str, typing.Any]:
    """Returns the description.

    Args:
      products: rows, inner size and columns of each timed product; (): the benchmark's own.
    """
    found = machine.describe()
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    device = jax.local_devices()[0]
    smi, settings = _nvidia_smi(), typing.cast(typing.Any, jax.config)
    return found | {
        "driver": smi.split(", ")[1] if smi.count(", ") else "unknown",
        "nvidia_smi": smi,
        "platform_version": device.client.platform_version,
        # None: XLA multiplies float32 matrices on a GPU in TF32.
        "matmul_precision": str(settings.jax_default_matmul_precision),
        "flags": {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))},
        "device_gb": device_memory.capacity(jax.local_devices()) / 1e9,
        "products": {dtype: machine.matmul_flop_s(dtype, products) for dtype in ("bfloat16", "float32")},
    }


def _nvidia_smi() -> str:
    """Returns the first line of nvidia-smi's answer, or an empty string."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""
