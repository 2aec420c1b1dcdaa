"""Kills, fills, corrupts and fuzzes flaxcap in real processes, and counts what survives.

    python experiments/torture.py                         all cases, about fifty minutes on two cores
    python experiments/torture.py --scale=0.05            a twentieth of the tries
    python experiments/torture.py --only=kill,preempt     cases whose names contain one of these

Each case prints one line. experiments/results/torture.json holds the last result of each case, and its scale.
docs/reliability.md lists the promise that each case checks.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
import traceback

try:
    from torture_cases import disk as torture_disk
    from torture_cases import inputs as torture_inputs
    from torture_cases import runs as torture_runs
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.startswith("torture_cases"):
        raise
    sys.exit(f"torture.py: {missing.name} is not installed, expected the extra test: pip install 'flaxcap[test]'")

CASES = (*torture_runs.CASES, *torture_disk.CASES, *torture_inputs.CASES)
RESULTS = pathlib.Path(__file__).parent / "results" / "torture.json"


def run(case, scale: float) -> dict:
    """Runs a case and returns its result. An exception counts as a loss."""
    begin = time.perf_counter()
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        try:
            found = case(pathlib.Path(scratch), scale)
        except Exception as e:
            traceback.print_exc()
            found = {"case": case.__name__, "tried": 1, "survived": 0, "lost": [f"{type(e).__name__}: {e}"]}
    return found | {
        "seconds": round(time.perf_counter() - begin, 1),
        "scale": scale,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of each case's tries, at least one try")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    a = parser.parse_args()
    wanted = [c for c in CASES if not a.only or any(part in c.__name__ for part in a.only.split(","))]
    if not wanted:
        parser.error(f"--only={a.only}: expected parts of {', '.join(c.__name__ for c in CASES)}")
    lost = 0
    for case in wanted:
        found = run(case, a.scale)
        lost += len(found["lost"])
        counts = f"tried {found['tried']:6}, survived {found['survived']:6}, lost {len(found['lost']):4}"
        print(f"{case.__name__:30} {counts}", flush=True)
        for line in found["lost"][:5]:
            print(f"    {line}", flush=True)
        keep(a.out, found)
    return int(lost > 0)


def keep(file: pathlib.Path, found: dict) -> None:
    """Replaces the case's result in the file."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[found["case"]] = found
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
