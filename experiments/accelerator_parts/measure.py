"""Computes one measurement and writes its record. accelerator.py starts this in a process of its own.

python -m accelerator_parts.measure NAME FILE [--tiny]
"""

import argparse
import collections
import pathlib
import sys
import traceback

from accelerator_parts import plan, programs, sizes
from jax import monitoring

from flaxcap.runtime import devices


def main() -> int:
    """Measures, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(programs.PROGRAMS))
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    devices.check_flax()
    devices.keep_compiled(None)
    events = collections.Counter()
    monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
    record: plan.Record = {"figures": [], "details": []}
    try:
        for found in programs.PROGRAMS[a.name](sizes.TINY if a.tiny else sizes.FULL):
            record["figures"] += found.figures
            record["details"].append(found.details)
            # With a hit, a time of compilation is the time of reading the cache.
            record["compilation_cache"] = {name: events[name] for name in ("cache_hits", "cache_misses")}
            plan.write(a.file, record)
    except Exception as e:
        traceback.print_exc()
        plan.write(a.file, record | {"problem": f"{type(e).__name__}: {e}".partition("\n")[0]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
