"""Measures everything on an accelerator, in about eight minutes, and prints a Markdown table.

    PYTHONPATH=. python experiments/accelerator.py --out=DIR --minutes=8
    PYTHONPATH=. python experiments/accelerator.py --out=DIR --only=train     measurements whose names contain this
    PYTHONPATH=. python experiments/accelerator.py --out=DIR --tiny           the same code with tiny sizes, on a CPU

Each measurement runs in a process of its own, with a time limit, and leaves DIR/NAME.json and DIR/logs/NAME.log.
The same command resumes after an interruption: it repeats only what is not done. DIR/table.md holds the table.
The exit status is 1 if a measurement failed or was killed at its time limit.

It needs jax (0.10 to 0.12), flax, optax, orbax-checkpoint, tensorstore, numpy, pillow and absl-py, and what these
install: etils, ml_dtypes, scipy, protobuf. The comparisons with PyTorch are skipped without PyTorch. It needs no
network, and neither tensorflow_datasets, array_record, matplotlib, tensorboardX, h5py nor tqdm.
"""

import argparse
import pathlib
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # flaxcap may not be installed

from accelerator_parts import plan, run, table


def main() -> int:
    """Runs the measurements and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the command")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--again", action="store_true", help="repeats measurements that are done")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU")
    a = parser.parse_args()
    end = time.monotonic() + 60 * a.minutes
    wanted = [m for m in plan.MEASUREMENTS if not a.only or any(part in m.name for part in a.only.split(","))]
    if not wanted:
        parser.error(f"--only={a.only}: expected parts of {', '.join(m.name for m in plan.MEASUREMENTS)}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="accelerator-") as scratch:
            statuses = [_one(each, a, pathlib.Path(scratch), end) for each in wanted]
    finally:
        text = table.markdown(plan.records(a.out))
        plan.write_text(a.out / "table.md", text)
        print(f"\n{text}", flush=True)
    return int(bool({plan.FAILED, plan.TIMEOUT} & set(statuses)))


def _one(measurement: plan.Measurement, a: argparse.Namespace, scratch: pathlib.Path, end: float) -> str:
    """Runs a measurement, unless it is done, writes its record, and returns its status."""
    file = a.out / f"{measurement.name}.json"
    before = plan.read(file)
    if before and not a.again and before["status"] == plan.DONE and before["tiny"] == a.tiny:
        print(f"{measurement.name:22} done before", flush=True)
        return plan.DONE
    record = run.measure(measurement, a.out, scratch, end - time.monotonic(), a.tiny)
    if record["status"] != plan.SKIPPED or not (before and before.get("figures")):  # an older figure is worth more
        plan.write(file, record)
    seconds = f"{record['seconds']:.1f} s" if "seconds" in record else ""
    print(f"{measurement.name:22} {record['status']:8} {seconds} {record.get('reason', '')}", flush=True)
    if record["status"] == plan.INTERRUPTED:
        sys.exit(1)
    return record["status"]


if __name__ == "__main__":
    sys.exit(main())
