"""Baselines: other programs that do the same work.

A baseline runs between our repetitions, so that both programs meet the machine in the same state.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from typing import Any

from flaxcap.errors import UserError

RATES = ("captions_s", "images_s")
STDERR_LINES = 10  # of a failed program, in the error message


class Baseline:
    """A command, and the results of its runs.

    The result of a run is the last JSON object on stdout that has `captions_s` or `images_s`.
    """

    def __init__(self, command: str):
        """Finds the program and the script of a command line. The command runs in the script's directory.

        Args:
          command: `PYTHON SCRIPT.py ARGUMENTS`, as typed into a shell. Without PYTHON, this Python runs the script.

        Raises:
          UserError: the program or the script does not exist.
        """
        self.command = command
        try:
            words = shlex.split(command)
        except ValueError as e:
            raise UserError(f"--against={command}: not a command line ({e})") from e
        if not words:
            raise UserError("--against is empty: expected a command line, PYTHON SCRIPT.py ARGUMENTS")
        if words[0].endswith(".py"):
            words.insert(0, sys.executable)
        if shutil.which(words[0]) is None:
            raise UserError(f"--against={command}: no such program: {words[0]}")
        if os.sep in words[0]:
            # Links stay: Python finds its virtual environment by the path that it was started with.
            words[0] = os.path.abspath(words[0])
        self._directory = None
        script = next((n for n, word in enumerate(words) if n and word.endswith(".py")), None)
        if script is not None:
            if not os.path.isfile(words[script]):
                raise UserError(f"--against={command}: no such file: {words[script]}")
            words[script] = os.path.abspath(words[script])
            self._directory = os.path.dirname(words[script])
        self._words = words
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        """Runs the command once and keeps its result.

        Raises:
          UserError: the command fails or prints no result. The message holds the end of its stderr.
        """
        try:
            found = subprocess.run(
                self._words,
                cwd=self._directory,
                capture_output=True,
                text=True,
                errors="replace",
            )
        except OSError as e:
            raise UserError(f"--against={self.command}: cannot be run: {e.strerror}") from e
        record = _last_record(found.stdout)
        if found.returncode or record is None:
            problem = f"ended with status {found.returncode}"
            if not found.returncode:
                problem = f"wrote no line with a JSON object that has {' or '.join(RATES)} above 0"
            end = found.stderr.strip().splitlines()[-STDERR_LINES:]
            raise UserError("\n  ".join([f"--against={self.command}: {problem}; the end of its stderr:", *end]))
        self.records.append(record)

    @property
    def rates(self) -> list[float]:
        """The captions or images a second of each run."""
        return [_rate(record) for record in self.records]

    def summary(self, ours: list[float]) -> dict[str, Any]:
        """Returns the runs' rates, and the ratio of each of our repetitions to the run after it."""
        ratios = [mine / theirs for mine, theirs in zip(ours, self.rates, strict=True)]
        return {
            "command": self.command,
            "rate": statistics.median(self.rates),
            "rates": self.rates,
            "ratios": ratios,
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "records": self.records,
        }


def _rate(record: dict[str, Any]) -> float:
    return float(next(record[name] for name in RATES if name in record))


def _last_record(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        try:
            record = json.loads(line)
            if isinstance(record, dict) and any(name in record for name in RATES) and 0 < _rate(record) < float("inf"):
                return record
        except (ValueError, TypeError):
            continue
    return None
