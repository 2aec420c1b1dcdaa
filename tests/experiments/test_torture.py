"""experiments/torture.py in small: a run that is killed, and the script itself."""

import json
import subprocess
import sys

from command import ROOT

EXPERIMENTS = ROOT / "experiments"


def test_a_run_killed_twice_is_bit_equal_to_one_left_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from torture_cases import runs

    found = runs.train_killed(tmp_path, 0.04)
    assert found["tried"] >= 2
    assert found["lost"] == []


def test_the_script_runs_a_case_and_writes_what_it_found(tmp_path):
    out = tmp_path / "torture.json"
    args = ["--only=not_finite", "--scale=0.1", f"--out={out}"]
    done = subprocess.run([sys.executable, EXPERIMENTS / "torture.py", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not_finite                     tried      1, survived      1, lost    0" in done.stdout
    (case,) = json.loads(out.read_text()).values()
    assert (case["case"], case["tried"], case["lost"], case["scale"]) == ("not_finite", 1, [], 0.1)
    assert case["steps_skipped"] > 0
