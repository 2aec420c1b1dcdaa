"""experiments/torture.py with few tries, and the table of promises in docs/reliability.md."""

import json
import re
import subprocess
import sys

import torture
from command import ROOT
from torture_cases import runs

EXPERIMENTS = ROOT / "experiments"
RELIABILITY = ROOT / "docs" / "reliability.md"


def test_a_run_killed_twice_is_bit_equal_to_an_undisturbed_one(tmp_path):
    found = runs.train_killed(tmp_path, 0.04)
    assert found["tried"] >= 2
    assert found["lost"] == []


def test_the_script_runs_a_case_and_writes_its_result(tmp_path):
    out = tmp_path / "torture.json"
    args = ["--only=not_finite", "--scale=0.1", f"--out={out}"]
    done = subprocess.run([sys.executable, EXPERIMENTS / "torture.py", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not_finite                     tried      1, survived      1, lost    0" in done.stdout
    (case,) = json.loads(out.read_text()).values()
    assert (case["case"], case["tried"], case["lost"], case["scale"]) == ("not_finite", 1, [], 0.1)
    assert case["steps_skipped"] > 0


def test_the_script_names_the_extra_that_it_needs():
    block = "import runpy, sys; sys.modules['hypothesis'] = None; sys.path.insert(0, sys.argv[1])"
    run = f"{block}; runpy.run_path(sys.argv[1] + '/torture.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run, str(EXPERIMENTS)], capture_output=True, text=True)
    assert done.returncode == 1
    message = "torture.py: hypothesis is not installed, expected the extra test: pip install 'flaxcap[test]'\n"
    assert done.stderr == message


def test_the_table_of_promises_names_every_case_and_existing_tests():
    rows = [line for line in RELIABILITY.read_text().splitlines() if line.startswith("|")]
    cells = [row.strip("|").split("|")[1:] for row in rows if row.count("|") == 4]
    cases = {name for case, _ in cells for name in re.findall(r"`(\w+)`", case)}
    assert cases == {case.__name__ for case in torture.CASES}
    tests = {name for _, test in cells for name in re.findall(r"`([\w/]+\.py)`", test)}
    assert tests
    assert [name for name in tests if not (ROOT / "tests" / name).exists()] == []


def test_the_results_are_of_every_case():
    assert json.loads(torture.RESULTS.read_text()).keys() == {case.__name__ for case in torture.CASES}
