"""CPU cores become JAX devices."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from command import is_known, succeed
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.commands.main import main
from flaxcap.runtime import devices as devices_lib


@given(st.integers(1, 40), st.integers(1, 2000), st.integers(1, 20))
def test_devices_divide_the_images_and_each_has_enough(cores, images, least):
    possible = [n for n in range(1, min(cores, 16) + 1) if images % n == 0 and images // n >= least]
    assert devices_lib.devices_of(cores, images, least) == max([1, *possible])


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, devices_lib.devices_of(devices_lib.usable_cores(), 48, 16)),
        ({"JAX_NUM_CPU_DEVICES": "5"}, 5),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_cores_are_devices_unless_a_variable_sets_their_number(variables, devices):
    program = "import jax; from flaxcap.runtime import devices; devices.share_cores(48, 16); print(jax.device_count())"
    assert _printed(program, **variables) == devices


def test_devices_stay_after_jax_is_initialised():
    use = "import jax; from flaxcap.runtime import devices; jax.devices(); devices.share_cores(8, 1)"
    assert _printed(f"{use}; print(jax.device_count())") == 1


def _printed(program: str, **variables: str) -> int:
    """Runs a program with no variables about devices except the given ones. Returns the number that it prints."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= variables
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_command_uses_as_many_cores_as_its_batch_allows():
    batch = ["--config.train.batch_images=48", "--config.encoder.block=mixed0"]
    out = succeed("bench", "input", *batch, "--images=96", "--steps=1", "--repeats=1", devices=None)
    assert f"input: {devices_lib.devices_of(devices_lib.usable_cores(), 48, 16)} x cpu" in out


def test_a_compiler_option_that_jaxlib_lacks_is_left_out_with_one_line(caplog):
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert devices_lib.compiler_option("xla_no_such_option", "1") is None
    assert [record.message for record in caplog.records] == [
        "compiled without xla_no_such_option=1: INVALID_ARGUMENT: No such compile option: 'xla_no_such_option'"
    ]
    assert devices_lib.compiler_option("xla_backend_optimization_level", "1") == {"xla_backend_optimization_level": "1"}


def test_a_flag_that_jaxlib_lacks_is_found_without_an_abort():
    assert is_known("--xla_backend_optimization_level=0")
    assert not is_known("--xla_no_such_flag=1")


def test_a_flax_that_does_not_go_with_jax_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flax.nnx", None)  # its import fails
    assert main(["verify", "--workdir=run"]) == 1
    line = f"flaxcap verify: flax {version('flax')} does not work with jax {version('jax')}, install a newer flax: "
    assert capsys.readouterr().err.startswith(line)
