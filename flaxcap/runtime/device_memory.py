"""Memory that a compiled step needs on a device, known before it runs, and memory that a device has."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax

from flaxcap.config import ConfigError


def capacity(devices: list) -> int:
    """Returns the bytes available on each device: the accelerator's memory, or an equal part of the host's memory."""
    stats: Callable = devices[0].memory_stats
    limit = (stats() or {}).get("bytes_limit")
    if limit:
        return limit
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)


def needed(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes on each device: arguments, results and temporaries. Donated buffers count once."""
    m: Any = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def check(compile_for: Callable[[int], jax.stages.Compiled], batch_images: int, devices: list, all_devices: int) -> int:
    """Returns the bytes that the step of a batch needs on each device.

    Args:
      compile_for: compiles the step for a number of images. RESOURCE_EXHAUSTED by the compiler counts as too much.
      batch_images: images in a batch.
      devices: devices of this process.
      all_devices: number of devices of all processes; it divides the batch.

    Raises:
      ConfigError: the step needs more than a device has. The message names the largest batch that fits.
    """
    limit = capacity(devices)

    def need(images: int) -> float:
        try:
            return needed(compile_for(images))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return math.inf

    asked = need(batch_images)
    if asked <= limit:
        return int(asked)
    most = batch_images - all_devices
    # Memory is linear in the batch size: two small batches predict the largest that fits.
    small, large = (-(-batch_images // (part * all_devices)) * all_devices for part in (8, 4))
    low, high = need(small), need(large)
    if low < high < math.inf:
        rate = (high - low) / (large - small)
        most = min(most, int((limit - low) / rate + small) // all_devices * all_devices)
    while most > 0 and need(most) > limit:  # the compiler's padding makes memory slightly more than linear
        most -= all_devices
    found = "does not compile for" if asked == math.inf else f"needs {megabytes(int(asked))} of"
    hint = f"the largest that fits is {most}"
    if most <= 0:
        hint = "none fits; --config.train.features=stream keeps the features off the device"
    raise ConfigError(
        f"--config.train.batch_images={batch_images}: a step {found} a device's {megabytes(limit)}; {hint}"
    )


def megabytes(size: int) -> str:
    """Returns a number of bytes in MB, for messages."""
    return f"{size / 1e6:.1f} MB"
