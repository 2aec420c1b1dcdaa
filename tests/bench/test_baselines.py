"""Baselines run in turn with our repetitions; a baseline that fails is an error that names the cause."""

import re
import sys
from typing import Any

import pytest

from flaxcap.bench import base, runner
from flaxcap.bench.baselines import Baseline
from flaxcap.commands.main import main
from flaxcap.config import Config
from flaxcap.errors import UserError


@pytest.fixture
def script(tmp_path):
    """Writes a baseline's script and returns the command that runs it."""

    def write(text: str, arguments: str = "", name: str = "baseline.py") -> str:
        path = tmp_path / "a baseline" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return f"{sys.executable} '{path}' {arguments}".strip()

    return write


SCRIPT = """
import json, os, pathlib, sys
runs = pathlib.Path("runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
print("warming up")
print(json.dumps({"captions_s": 1.0}))
print(json.dumps({"captions_s": float(sys.argv[1]) * len(runs.read_text()), "setting": sys.argv[2:]}))
print(json.dumps({"done": True}))
print("{ bye }")
"""


def test_a_baseline_runs_in_turn_and_in_its_own_directory(script, monkeypatch, tmp_path, capsys):
    command = script(SCRIPT, "100 --pad 'a b'")
    ran: list[int] = []
    runs = tmp_path / "a baseline" / "runs"

    def repeat() -> dict[str, Any]:
        ran.append(len(runs.read_text()) if runs.exists() else 0)
        return {"seconds": 1.0, "captions_s": [300.0, 500.0, 1500.0][len(ran) - 1]}

    class Ready:
        def __enter__(self):
            return base.Benchmark("captions_s", {}, repeat)

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(runner.BENCHMARKS, "train", lambda config, args: Ready())
    result = runner.bench("train", Config(), images=1, steps=1, warmup=0, repeats=3, workers=1, against=[command])
    assert ran == [0, 1, 2]  # ours, theirs, ours, theirs, ours, theirs
    (found,) = result["peers"]
    assert found["command"] == command
    assert found["rates"] == [100, 200, 300]
    assert found["ratios"] == [3, 2.5, 5]
    assert found["ratio"] == {"median": 3, "min": 2.5, "max": 5}
    assert found["records"][0] == {"captions_s": 100, "setting": ["--pad", "a b"]}
    printed = capsys.readouterr().out
    assert f"against {command}\n" in printed
    assert re.search(r"^times as fast +3 +2\.5 +5$", printed, re.MULTILINE)


def test_a_baseline_may_count_images_and_be_run_by_this_python(script):
    command = script("print('{\"images_s\": 4}')")
    baseline = Baseline(command.removeprefix(f"{sys.executable} "))
    baseline.run()
    assert baseline.rates == [4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; print('{\"captions_s\": 4}'); sys.exit('one\\ntwo')", "ended with status 1; .*\n  one\n  two$"),
        ("raise KeyError('torch')", r"ended with status 1; .*\n  KeyError: 'torch'$"),
        ("print('{}')", "wrote no line with a JSON object that has captions_s or images_s above 0"),
        ('print(\'[1]\\n{"captions_s": 0}\\n{"captions_s": null}\\n{"images_s": Infinity}\')', "wrote no line"),
        ("print('no JSON')", "wrote no line"),
    ],
)
def test_the_error_of_a_failed_baseline_holds_the_end_of_its_stderr(text, message, script):
    command = script(text)
    with pytest.raises(UserError, match=f"(?s)^{re.escape(f'--against={command}: ')}{message}"):
        Baseline(command).run()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "--against is empty: expected a command line, PYTHON SCRIPT.py ARGUMENTS"),
        ("python 'x.py", "--against=python 'x.py: not a command line (No closing quotation)"),
        ("nowhere/python x.py", "--against=nowhere/python x.py: no such program: nowhere/python"),
        ("x.py --pad 20", "--against=x.py --pad 20: no such file: x.py"),
    ],
)
def test_a_missing_baseline_is_an_error_before_anything_runs(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "train", f"--against={command}"]) == 1
    assert capsys.readouterr() == ("", f"flaxcap bench: {message}\n")
