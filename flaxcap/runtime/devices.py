"""How a process uses JAX: the other processes, its cores, and how programs are compiled and kept."""

import contextlib
import functools
import importlib
import importlib.metadata
import os

import jax
from absl import logging

from flaxcap.errors import UserError
from flaxcap.runtime import cache

# A process that is silent for so long is taken for dead, and the others end.
HEARTBEAT_S = 60
MOST_DEVICES = 16  # of a CPU: each has a copy of the parameters


def check_flax() -> None:
    """UserError where the installed flax cannot be imported beside the installed jax.

    pip installs such pairs, as it can exclude a release but not a pair: flax up to 0.12.8 asks for any jax from 0.10,
    and fails with jax 0.11.1 and newer (AttributeError: jax.experimental.hijax has no MutableHiType); so does flax
    0.12.9 with jax 0.11.2 and newer (no HiPrimitive).
    """
    try:
        importlib.import_module("flax.nnx")
    except (AttributeError, ImportError) as e:
        flax = importlib.metadata.version("flax")
        raise UserError(f"flax {flax} does not work with jax {jax.__version__}, install a newer flax: {e}") from e


def join(distributed: str) -> None:
    """Makes this process one of several, on JAX's own runtime: "auto", or "COORDINATOR:PORT,PROCESSES,ID"."""
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
    """On a CPU, makes devices of the cores, for work on so many images at once, `least` or more a device.

    Each computes its part beside the others, which takes less time than all cores take for each small product and
    sum in turn. Not where `$JAX_NUM_CPU_DEVICES` or `$XLA_FLAGS` says how many there are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in flags:
        with contextlib.suppress(RuntimeError):  # of a program that has used JAX already: its devices stay
            jax.config.update("jax_num_cpu_devices", devices_of(usable_cores(), images, least))


def devices_of(cores: int, images: int, least: int) -> int:
    """The most that so many cores make of which each has the same number of images, `least` or more."""
    most = max(1, min(cores, images // least, MOST_DEVICES))
    return next(n for n in range(most, 0, -1) if images % n == 0)


def usable_cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convolving() -> dict[str, str] | None:
    """Compiler options, for `jax.jit`, of a program whose time is that of convolutions.

    On a CPU Eigen shall make them. YNN, which XLA takes as for matrix products, needs up to twice as long.
    """
    on_cpu = jax.default_backend() == "cpu"
    return known("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT") if on_cpu else None


@functools.cache
def known(option: str, value: str) -> dict[str, str] | None:
    """The compiler option, for `jax.jit`; None, logged once, where the installed jaxlib does not know it.

    XLA's options come and go between releases, and a compilation with an unknown one fails: jaxlib 0.11.1 took away
    xla_cpu_use_fusion_emitters. The small program that tells compiles in 0.05 s.
    """
    options = {option: value}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as e:
        logging.warning("compiled without %s=%s: %s", option, value, str(e).partition("\n")[0])
        return None
    return options


def keep_compiled(directory: str | None) -> None:
    """Compiled programs are kept in `directory` and found there by the next run; "": nowhere.

    None: in JAX's own `$JAX_COMPILATION_CACHE_DIR`, else in flaxcap's cache.
    """
    if directory == "":
        return
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache.cache_dir() / "compiled")
    jax.config.update("jax_compilation_cache_dir", directory or default)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
