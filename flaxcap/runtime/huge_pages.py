"""Memory in pages of 2 MB, which the C library must be told of before a program begins."""

import os
import pathlib
import sys

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")  # on Linux: always, madvise or never
NAME, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def use() -> None:
    """Starts this program again with huge pages, where they are to be had and `$GLIBC_TUNABLES` says nothing of them.

    Each step of training on a CPU takes over 100 MB anew: in pages of 4 KB they cost 4 to 8 percent of its time.
    """
    setting = SETTING.read_text() if SETTING.exists() else ""
    told = os.environ.get(NAME, "")
    if "[madvise]" in setting and TUNABLE not in told and sys.executable:
        os.environ[NAME] = ":".join(filter(None, (told, f"{TUNABLE}=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def others_environment() -> dict[str, str]:
    """The environment without them, for another program."""
    kept = (told for told in os.environ.get(NAME, "").split(":") if told != f"{TUNABLE}=1")
    return os.environ | {NAME: ":".join(kept)}
