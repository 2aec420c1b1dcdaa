"""What a compiled step needs of a device's memory, known before it runs, and what a device has."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax

from flaxcap.config import ConfigError


def capacity(devices: list) -> int:
    """Bytes that a program may take on each of these devices: an accelerator's own, or an equal part of the host's."""
    stats: Callable = devices[0].memory_stats
    limit = (stats() or {}).get("bytes_limit")
    if limit:
        return limit
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)


def needed(compiled: jax.stages.Compiled) -> int:
    """Bytes on each device: what goes in and comes out, donated once, and the arithmetic between."""
    m: Any = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def check(compile_for: Callable[[int], jax.stages.Compiled], batch_images: int, devices: list, all_devices: int) -> int:
    """The bytes that the step of a batch needs on each device.

    `compile_for(images)` compiles the step for a batch of so many. ConfigError, naming the largest batch that fits,
    where it needs more than `devices`, this process's, have. A compiler may refuse as well: that counts as too much.
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
    # A step's need is linear in its batch: two small ones tell the largest.
    small, large = (-(-batch_images // (part * all_devices)) * all_devices for part in (8, 4))
    low, high = need(small), need(large)
    if low < high < math.inf:
        rate = (high - low) / (large - small)
        most = min(most, int((limit - low) / rate + small) // all_devices * all_devices)
    while most > 0 and need(most) > limit:  # by what a compiler rounds up
        most -= all_devices
    found = "does not compile for" if asked == math.inf else f"needs {megabytes(int(asked))} of"
    hint = f"the largest that fits is {most}"
    if most <= 0:
        hint = "none fits; --config.train.features=stream keeps the features off the device"
    raise ConfigError(
        f"--config.train.batch_images={batch_images}: a step {found} a device's {megabytes(limit)}; {hint}"
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
