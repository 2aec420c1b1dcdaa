"""experiments/accelerator.py with tiny sizes, without PyTorch and the packages that its machine may lack."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from accelerator_parts import gradients, kernels, plan, programs, run, sizes, table
from command import QUICK_TO_COMPILE, ROOT

SCRIPT = ROOT / "experiments" / "accelerator.py"
ABSENT = ("tensorflow_datasets", "array_record", "matplotlib", "tensorboardX", "h5py", "tqdm", "torch")
NAMES = [measurement.name for measurement in plan.MEASUREMENTS]
HIDE = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine with one device, where the packages of ABSENT cannot be imported."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text(HIDE)
    flags = f"--xla_force_host_platform_device_count=1 {QUICK_TO_COMPILE}"
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "XLA_FLAGS": flags}


def accelerator(env: dict[str, str], out: pathlib.Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), f"--out={out}", "--tiny", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def out(env, tmp_path_factory) -> pathlib.Path:
    """The directory of a complete run."""
    path = tmp_path_factory.mktemp("accelerator") / "out"
    done = accelerator(env, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert (path / "table.md").read_text() in done.stdout
    return path


def test_the_packages_are_hidden(env):
    for name in ABSENT:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], env=env, capture_output=True, text=True)
        assert f"{name} is hidden" in done.stderr


def test_there_is_a_program_for_every_measurement():
    assert sorted(NAMES) == sorted(programs.PROGRAMS)


@pytest.mark.parametrize("measurement", plan.MEASUREMENTS, ids=NAMES)
def test_every_measurement_is_recorded_with_positive_figures(out, measurement):
    record = json.loads((out / f"{measurement.name}.json").read_text())
    assert (record["name"], record["tiny"]) == (measurement.name, True)
    if measurement.needs_torch:
        assert (record["status"], record["reason"]) == ("skipped", "no torch")
        return
    assert (record["status"], record["reason"]) == ("done", "")
    assert record["seconds"] > 0
    assert len(record["details"]) >= 1
    for figure in record["figures"]:
        # On a CPU the first comparison of gradients is one of equal programs.
        assert figure["value"] > 0 or figure["what"].startswith("float32: relative error")
        compiled = not re.match(
            "matrix products|device time|float32|bfloat16|the host's share|from JPEG", figure["what"]
        )
        assert (figure["compile_s"] > 0) == compiled, figure


def test_the_records_hold_what_was_asked(out):
    record = {name: json.loads((out / f"{name}.json").read_text()) for name in NAMES}
    what = {name: [figure["what"] for figure in found.get("figures", [])] for name, found in record.items()}
    assert what["decode_greedy"] == ["greedy, 2 images", "greedy, one image", "greedy, 4 images"]
    assert what["decode_beam5"] == ["beam of 5, 2 images", "beam of 5, one image", "beam of 5, 4 images"]
    assert what["extract"] == ["the network, from arrays", *(f"from JPEG files, decoder threads: {n}" for n in (1, 2))]
    (streamed,), (resident,) = record["train_streamed_1024"]["details"], record["train_bf16_1024"]["details"]
    assert (streamed["facts"]["features"], resident["facts"]["features"]) == ("streamed", "on the device")
    dtypes = [record[f"train_{d}_1024"]["details"][0]["config"]["train"]["dtype"] for d in ("bf16", "f32")]
    assert dtypes == ["bfloat16", "float32"]
    (machine,) = record["machine"]["details"]
    assert machine["versions"]["jax"] == jax.__version__
    assert {"flax", "optax", "orbax-checkpoint", "tensorstore", "pillow"} <= machine["versions"].keys()
    assert machine["matmul_precision"] == "None"
    (profiled,) = record["profile"]["details"]
    assert len(profiled["kernels"]) == kernels.TOP
    assert 0 < sum(kernel["share"] for kernel in profiled["kernels"]) <= 1
    exact, rounded = record["gradients"]["details"]
    assert exact["passes"]
    assert rounded["passes"]
    assert 0.999 < rounded["cosine"] < 1
    for figure, found in zip(record["extract"]["figures"][1:], record["extract"]["details"], strict=True):
        assert figure["notes"].endswith(f"bottleneck: {found['bottleneck']}")


def test_the_table_has_a_row_for_every_figure(out):
    rows = [line.split(" | ") for line in (out / "table.md").read_text().splitlines() if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows]
    for record in plan.records(out):
        assert names.count(record["name"]) == max(1, len(record.get("figures", [])))
    assert sum(name.startswith("`") for name in names) == kernels.TOP


def test_a_second_call_repeats_nothing(env, out):
    before = {name: (out / f"{name}.json").stat().st_mtime_ns for name in NAMES if not name.startswith("torch")}
    done = accelerator(env, out)
    assert done.returncode == 0
    assert done.stdout.count("done before") == len(before)
    assert {name: (out / f"{name}.json").stat().st_mtime_ns for name in before} == before


def test_a_call_without_time_skips_with_a_reason(env, tmp_path):
    done = accelerator(env, tmp_path, "--minutes=0.05")
    assert done.returncode == 0
    found = plan.records(tmp_path)
    assert [record["status"] for record in found] == ["skipped"] * len(NAMES)
    reasons = [record["reason"] for record in found if record["reason"] != "no torch"]
    assert reasons
    assert all(re.fullmatch(r"[0-3] s left, needs 5 s", reason) for reason in reasons)
    assert "| machine | **skipped** |" in (tmp_path / "table.md").read_text()


def test_an_interrupted_call_keeps_what_is_done(env, tmp_path):
    command = [sys.executable, str(SCRIPT), f"--out={tmp_path}", "--tiny", "--only=machine,gradients"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "logs" / "gradients.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "")
    machine, comparison = plan.records(tmp_path)
    assert (machine["status"], comparison["status"]) == ("done", "interrupted")
    assert "| gradients | **interrupted** |" in (tmp_path / "table.md").read_text()
    assert "done before" in accelerator(env, tmp_path, "--only=machine").stdout


def test_a_failure_is_recorded(env, tmp_path):
    done = accelerator(env | {"JAX_PLATFORMS": "nowhere"}, tmp_path, "--only=machine")
    assert done.returncode == 1
    (record,) = plan.records(tmp_path)
    assert (record["status"], record["reason"]) == ("failed", "ended with status 1")
    assert "nowhere" in record["problem"]
    assert any("RuntimeError" in line for line in record["error"])
    assert "| machine | **failed** |" in (tmp_path / "table.md").read_text()
    assert record["problem"] in (tmp_path / "table.md").read_text()


def test_an_unknown_name_is_an_error(env, tmp_path):
    done = accelerator(env, tmp_path, "--only=nothing")
    assert done.returncode == 2
    assert "--only=nothing: expected parts of machine, train_bf16_1024" in done.stderr


def test_a_measurement_is_killed_at_its_limit(tmp_path):
    record = run.measure(plan.Measurement("gradients", 1, 1), tmp_path, tmp_path, left=60, tiny=True)
    assert (record["status"], record["reason"]) == ("timeout", "killed after 1 s")
    assert 1 <= record["seconds"] < 10


def test_a_limit_ends_the_processes_of_a_process(tmp_path):
    command = ["bash", "-c", "sleep 60 & echo $!; wait"]
    assert run.execute(command, dict(os.environ), tmp_path / "log", timeout=1) is None
    child = pathlib.Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child runs on")


def test_a_size_that_fails_leaves_the_others(monkeypatch):
    def decoded(_, method, images, latency):
        if images == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return programs.Found([programs.figure(method, images, "captions/s")], {})

    monkeypatch.setattr(programs, "_decoded", decoded)
    found = programs.decode(sizes.TINY, "greedy")
    assert next(found).figures[0]["value"] == 4
    with pytest.raises(programs.MeasurementError, match="2 images: RESOURCE_EXHAUSTED"):
        next(found)


def test_a_difference_of_gradients_is_a_failure(monkeypatch):
    kernel = np.linspace(1, 2, 50)
    expected = 1.0, gradients.layers({"a": {"kernel": kernel, "bias": kernel[:5]}, "b": {"kernel": -kernel}})
    for factor, passes in ((1 + 5e-5, True), (1 + 5e-4, False)):
        found = 1.0, expected[1] | {"b": factor * expected[1]["b"]}
        result = gradients.exact(found, expected)
        assert result["passes"] == passes
        ((what, value, _),) = result["rows"]
        assert "worst layer (b)" in what
        assert value == pytest.approx(factor - 1)
    for factor, passes in ((1.005, True), (1.02, False)):
        found = 1.0, {name: factor * grads for name, grads in expected[1].items()}
        assert gradients.rounded(found, expected)["passes"] == passes
    turned = 1.0, expected[1] | {"b": -expected[1]["b"]}
    assert not gradients.rounded(turned, expected)["passes"]
    monkeypatch.setattr(gradients, "compare", lambda *_: iter([{"dtype": "float32", "passes": False, "rows": []}]))
    with pytest.raises(programs.MeasurementError, match="gradients differ from the CPU's in float32"):
        list(programs.compare(sizes.TINY))


def test_kernels_are_ordered_by_their_total_time():
    found = kernels.top([("a", 1.0), ("b", 3.0), ("a", 2.5), *[(f"k{n}", 0.01) for n in range(20)]])
    assert [kernel["name"] for kernel in found["kernels"][:2]] == ["a", "b"]
    assert (found["kernels"][0]["ms"], found["kernels"][0]["count"]) == (3.5, 2)
    assert found["device_ms"] == pytest.approx(6.7)
    assert found["kernels"][0]["share"] == pytest.approx(3.5 / 6.7)
    assert len(found["kernels"]) == kernels.TOP


@pytest.mark.parametrize(
    ("complete", "decoding", "network", "expected"),
    [(90, 100, 300, "decoding"), (90, 300, 100, "the network"), (50, 100, 300, "neither alone")],
)
def test_the_bottleneck_is_the_slower_part(complete, decoding, network, expected):
    assert programs.limit(complete, decoding, network).startswith(expected)


def test_numbers_in_the_table_have_few_digits():
    found = [table.number(x) for x in (285123.4, 123.45, 9.876, 0.000123, 0)]
    assert found == ["285,123", "123", "9.88", "0.000123", "0"]
