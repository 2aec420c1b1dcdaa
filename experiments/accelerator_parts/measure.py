"""Computes one measurement and writes its record. accelerator.py starts this in a process of its own.

python -m accelerator_parts.measure NAME FILE [--tiny]
"""

import argparse
import collections
import pathlib

import jax
from accelerator_parts import plan, programs, sizes

from flaxcap.runtime import devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(programs.PROGRAMS))
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    devices.check_flax()
    devices.keep_compiled(None)
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
    figures, details = [], []
    for found in programs.PROGRAMS[a.name](sizes.TINY if a.tiny else sizes.FULL):
        figures += found.figures
        details.append(found.details)
        # Cache hits mark compile times that are no times of compilation.
        cache = {name: events[name] for name in ("cache_hits", "cache_misses")}
        plan.write(a.file, {"figures": figures, "details": details, "compilation_cache": cache})


if __name__ == "__main__":
    main()
