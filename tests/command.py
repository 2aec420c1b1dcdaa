"""flaxcap in a process of its own, as users run it."""

import os
import pathlib
import subprocess
import sys


def is_known(flag: str) -> bool:
    """Returns True if the installed jaxlib knows a flag of XLA. An unknown flag aborts the process, so another
    process tries it (0.5 s). The library's bytes do not tell: jaxlib 0.11.1 dropped a flag whose name is still there.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    tried = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True)
    return tried.returncode == 0


# Small arrays, many programs: faster machine code takes longer to make than it saves. test_end_to_end and test_cli run
# all programs as users do.
WANTED = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
LEFT_OUT = [flag for flag in WANTED if not is_known(flag)]
QUICK_TO_COMPILE = " ".join(flag for flag in WANTED if flag not in LEFT_OUT)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def flaxcap(*args: object, cwd: pathlib.Path = ROOT, devices: int | None = 1) -> subprocess.CompletedProcess[str]:
    """Runs a command on so many devices, None: on as many as it likes. Its programs are compiled as for users (see
    conftest); warnings are errors.
    """
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if devices else ""}
    command = [sys.executable, "-W", "error", "-m", "flaxcap", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)


def succeed(*args: object, devices: int | None = 1) -> str:
    """Runs a command, which must succeed without a word of complaint, and returns what it printed."""
    done = flaxcap(*args, devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done.stdout
