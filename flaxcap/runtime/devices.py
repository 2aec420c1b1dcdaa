"""Configures JAX in this process: distributed runtime, CPU devices, compiler options and compilation cache."""

import contextlib
import functools
import importlib
import importlib.metadata
import os

import jax
from absl import logging

from flaxcap.errors import UserError
from flaxcap.runtime import cache

HEARTBEAT_S = 60  # JAX declares a process that is silent for this long dead, and ends the other processes
MOST_DEVICES = 16  # on a CPU; each device holds a copy of the parameters


def check_flax() -> None:
    """Checks that the installed flax works with the installed jax.

    pip can exclude a release but not a pair of releases. flax up to 0.12.8 fails with jax 0.11.1 and newer:
    "jax.experimental.hijax has no MutableHiType". flax 0.12.9 fails with jax 0.11.2 and newer: "no HiPrimitive".

    Raises:
      UserError: flax cannot be imported.
    """
    try:
        importlib.import_module("flax.nnx")
    except (AttributeError, ImportError) as e:
        flax = importlib.metadata.version("flax")
        raise UserError(f"flax {flax} does not work with jax {jax.__version__}, install a newer flax: {e}") from e


def join(distributed: str) -> None:
    """Joins JAX's distributed runtime.

    Args:
      distributed: "auto" to detect the cluster, or "COORDINATOR:PORT,PROCESSES,ID".

    Raises:
      UserError: `distributed` has another form.
    """
    if distributed == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S)
        return
    try:
        coordinator, *numbers = distributed.split(",")
        processes, number = map(int, numbers)
    except ValueError:
        raise UserError(f"--distributed={distributed}: expected auto, or COORDINATOR:PORT,PROCESSES,ID") from None
    jax.distributed.initialize(coordinator, processes, number, heartbeat_timeout_seconds=HEARTBEAT_S)


def share_cores(images: int, least: int) -> None:
    """Makes the CPU's cores separate JAX devices, unless `$JAX_NUM_CPU_DEVICES` or `$XLA_FLAGS` sets their number.

    Small operations scale better over devices than over the threads of one device. On two Zen 5 cores, two devices
    train on 678 captions/s and one device on 610.

    Args:
      images: images in a batch; the number of devices divides it.
      least: fewest images for one device.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in flags:
        with contextlib.suppress(RuntimeError):  # JAX is initialised already: its devices stay
            jax.config.update("jax_num_cpu_devices", devices_of(usable_cores(), images, least))


def devices_of(cores: int, images: int, least: int) -> int:
    """Returns the largest number of devices that `cores` can form.

    Args:
      cores: usable cores, an upper bound beside MOST_DEVICES.
      images: images in a batch; the result divides it.
      least: fewest images for one device.
    """
    most = max(1, min(cores, images // least, MOST_DEVICES))
    return next(n for n in range(most, 0, -1) if images % n == 0)


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convolving() -> dict[str, str] | None:
    """Returns compiler options for `jax.jit` of a program that mostly convolves.

    On a CPU, Eigen then computes the convolutions. jaxlib 0.10.2 and newer would use YNN, which takes up to twice as
    long.
    """
    if jax.default_backend() != "cpu":
        return None
    return compiler_option("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")


@functools.cache
def compiler_option(option: str, value: str) -> dict[str, str] | None:
    """Returns {option: value} for `jax.jit`, or None if the installed jaxlib has no such compiler option.

    A compilation with an unknown option fails, and releases remove options: jaxlib 0.11.1 has no
    xla_cpu_use_fusion_emitters. The check compiles a small program, once, in 0.05 s. A missing option is logged.
    """
    options = {option: value}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as e:
        logging.warning("compiled without %s=%s: %s", option, value, str(e).partition("\n")[0])
        return None
    return options


def keep_compiled(directory: str | None) -> None:
    """Enables JAX's persistent compilation cache for programs that take 0.3 s or more to compile.

    Args:
      directory: directory of the cache; "": no cache; None: `$JAX_COMPILATION_CACHE_DIR`, or else flaxcap's own.
    """
    if directory == "":
        return
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache.cache_dir() / "compiled")
    jax.config.update("jax_compilation_cache_dir", directory or default)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
