"""Whether a program starts again with huge pages, and what of it the programs it starts see."""

import os
import subprocess
import sys

import pytest
from command import ROOT

from flaxcap.runtime import huge_pages

PROGRAM = """
import os, pathlib, sys
from flaxcap.runtime import huge_pages
huge_pages.SETTING = pathlib.Path(sys.argv[1])
print(os.getpid(), flush=True)
huge_pages.use()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.warnoptions)
"""


def started(setting: str, told: str | None, tmp_path) -> list[str]:
    """What PROGRAM prints under a kernel of such a setting, to a user who tells glibc this."""
    file = tmp_path / "enabled"
    if setting:
        file.write_text(setting)
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {} if told is None else {"GLIBC_TUNABLES": told}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, file, "--a=b c", "d"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=4", "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"),
    ],
)
def test_the_same_program_starts_again_with_huge_pages(told, expected, tmp_path):
    first, second, last = started("always [madvise] never", told, tmp_path)
    assert first == second  # one process
    assert last == f"{expected} ['--a=b c', 'd'] ['error']"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("[always] madvise never", None),
        ("always madvise [never]", None),
        ("", None),
        ("always [madvise] never", "glibc.malloc.hugetlb=0"),
    ],
)
def test_it_goes_on_where_they_are_not_to_be_had_or_are_spoken_of(setting, told, tmp_path):
    (_, last) = started(setting, told, tmp_path)
    assert last == f"{told} ['--a=b c', 'd'] ['error']"


@pytest.mark.parametrize(
    ("told", "expected"), [("a.b=1:glibc.malloc.hugetlb=1", "a.b=1"), ("glibc.malloc.hugetlb=1", "")]
)
def test_another_program_is_not_told_of_them(told, expected, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", told)
    assert huge_pages.others_environment() == os.environ | {"GLIBC_TUNABLES": expected}
