"""What a process sets up before it uses JAX: the other processes, and where compiled programs are kept."""

import os

import jax

from flaxcap import config as config_lib
from flaxcap.errors import UserError

# A process that is silent for so long is taken for dead, and the others end.
HEARTBEAT_S = 60


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


def keep_compiled(directory: str | None) -> None:
    """Compiled programs are kept in `directory` and found there by the next run; "": nowhere.

    None: in JAX's own `$JAX_COMPILATION_CACHE_DIR`, else in flaxcap's cache.
    """
    if directory == "":
        return
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(config_lib.cache_dir() / "compiled")
    jax.config.update("jax_compilation_cache_dir", directory or default)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
