"""How the cores of a CPU are taken: as devices, or each for a program of its own."""

import os
import subprocess
import sys

import pytest
from command import succeed
from hypothesis import given
from hypothesis import strategies as st

from flaxcap import runtime


@given(st.integers(1, 40), st.integers(1, 2000), st.integers(1, 20))
def test_devices_divide_the_images_and_each_has_enough(cores, images, least):
    possible = [n for n in range(1, min(cores, 16) + 1) if images % n == 0 and images // n >= least]
    assert runtime.devices_of(cores, images, least) == max([1, *possible])


@pytest.mark.parametrize(
    ("told", "devices"),
    [
        ({}, runtime.devices_of(runtime.usable_cores(), 48, 16)),
        ({"JAX_NUM_CPU_DEVICES": "5"}, 5),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_cores_are_devices_unless_told_otherwise(told, devices):
    program = "import jax; from flaxcap import runtime; runtime.share_cores(48, 16); print(jax.device_count())"
    assert _printed(program, **told) == devices


def test_devices_stay_where_jax_is_in_use_already():
    program = (
        "import jax; from flaxcap import runtime; jax.devices(); runtime.share_cores(8, 1); print(jax.device_count())"
    )
    assert _printed(program) == 1


def _printed(program: str, **told: str) -> int:
    """By a process that is told nothing of devices but this."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", *runtime.POOL_SIZE)
    } | told
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


# Printed: the percentage of a program's time that the thread has spent which calls it.
OWN_SHARE = """
import os, time
import jax, jax.numpy as jnp
from flaxcap import runtime

runtime.compute_in_callers()
assert "PJRT_NPROC" not in os.environ
x = jnp.ones((8, 64, 64, 64))
kernel = jnp.ones((3, 3, 64, 64))
convolve = lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
run = jax.jit(lambda x: jnp.tanh(convolve(convolve(jnp.tanh(convolve(x)) @ kernel[0, 0])))).lower(x).compile()
jax.block_until_ready(run(x))
own, all_threads = time.thread_time(), time.process_time()
for _ in range(5):
    jax.block_until_ready(run(x))
print(int(100 * (time.thread_time() - own) / (time.process_time() - all_threads)))
"""


def test_a_program_is_computed_by_the_thread_that_calls_it():
    assert _printed(OWN_SHARE) > 90


@pytest.mark.parametrize("told", [{"JAX_NUM_CPU_DEVICES": "3"}, {"PJRT_NPROC": "3"}])
def test_a_user_who_has_spoken_of_the_cores_is_obeyed(told):
    program = (
        "import os, jax; from flaxcap import runtime; runtime.compute_in_callers();"
        "print(10 * jax.device_count() + jax.config.read('jax_cpu_enable_async_dispatch'))"
    )
    assert _printed(program, **told) == 10 * int(told.get("JAX_NUM_CPU_DEVICES", 1)) + 1


def test_a_command_takes_the_cores_that_its_batch_is_for():
    batch = ["--config.train.batch_images=48", "--config.encoder.block=mixed0"]
    out = succeed("bench", "input", *batch, "--images=96", "--steps=1", "--repeats=1", devices=None)
    assert f"input: {runtime.devices_of(runtime.usable_cores(), 48, 16)} x cpu" in out
