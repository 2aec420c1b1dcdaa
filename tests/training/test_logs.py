"""Log lines and the clock of interrupted and resumed runs."""

import itertools
import json
import math
import pathlib
import time

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from flaxcap.training import logs


def scalars(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    """Returns (step, name, value) of every event file, the oldest first, without events that a later file purges."""
    found: list[tuple[int, str, float]] = []
    for file in sorted(workdir.glob("events.out.tfevents.*")):
        rest = file.read_bytes()
        while rest:  # records: length, its checksum, an event, its checksum
            length = int.from_bytes(rest[:8], "little")
            event = Event.FromString(rest[12 : 12 + length])
            rest = rest[16 + length :]
            if event.HasField("session_log"):
                found = [entry for entry in found if entry[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def write(workdir: pathlib.Path, steps: range, start: int = 0) -> None:
    metrics = logs.Metrics(workdir, start)
    for step in steps:
        metrics.write(step, {"train/loss": 1 / step, "captions_per_s": 100.0})
    metrics.close()


def test_lines_are_read_as_they_were_written(tmp_path):
    metrics = logs.Metrics(tmp_path, 0)
    metrics.write(20, {"train/loss": 0.5})
    assert logs.read(tmp_path) == [{"step": 20, "train/loss": 0.5}]  # written at once: a kill loses no line
    metrics.write(40, {"epoch": 1, "val/loss": 0.25})
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == logs.read(tmp_path)
    assert logs.read(tmp_path)[1] == {"step": 40, "epoch": 1, "val/loss": 0.25}


def test_a_run_without_metrics_has_none(tmp_path):
    assert logs.read(tmp_path) == []


def test_numbers_that_are_not_finite_are_written_too(tmp_path):
    metrics = logs.Metrics(tmp_path, 0)
    metrics.write(1, {"train/loss": math.nan, "val/loss": math.inf})
    metrics.close()
    (line,) = logs.read(tmp_path)
    assert math.isnan(line["train/loss"])
    assert line["val/loss"] == math.inf


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_a_resumed_run_deletes_the_lines_that_it_will_write_again(step, tmp_path, monkeypatch):
    # Event files are named by the second. From now on: a writer of an earlier test may still compare its times.
    seconds = itertools.count(int(time.time()))
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    write(tmp_path, range(1, 6))
    write(tmp_path, range(step + 1, 9), start=step)
    steps = [*range(1, min(step, 5) + 1), *range(step + 1, 9)]
    assert [line["step"] for line in logs.read(tmp_path)] == steps
    shown = [(s, name) for s, name, _ in scalars(tmp_path)]
    assert shown == [(s, name) for s in steps for name in ("train/loss", "captions_per_s")]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_that_a_kill_cut_short_is_deleted(cut, tmp_path):
    write(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) - 1 - cut])
    assert [line["step"] for line in logs.read(tmp_path)] == [1, 2]
    write(tmp_path, range(3, 5), start=3)
    assert [line["step"] for line in logs.read(tmp_path)] == [1, 2, 3, 4]
    assert file.read_text().startswith(text[: text.index("\n", text.index("\n") + 1)])


def test_tensorboard_gets_every_scalar(tmp_path):
    write(tmp_path, range(1, 4))
    expected = [(s, name, value) for s in (1, 2, 3) for name, value in (("train/loss", 1 / s), ("captions_per_s", 100))]
    assert scalars(tmp_path) == [(s, name, pytest.approx(value)) for s, name, value in expected]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.jax, "process_index", lambda: 1)
    write(tmp_path, range(1, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, a list of one number that the test increases."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def test_the_clock_counts_while_it_runs(now):
    clock = logs.Clock({})
    now[0] += 5
    assert clock.now() == 0
    clock.run()
    now[0] += 3
    assert clock.now() == 3
    clock.run()  # runs already
    now[0] += 4
    assert clock.now() == 7
    clock.pause()
    now[0] += 50
    assert clock.now() == clock.seconds == 7
    clock.pause()
    clock.run()
    now[0] += 1
    assert clock.now() == 8


def test_the_clock_survives_a_restart(now):
    clock = logs.Clock({"best": 1.0})
    clock.run()
    now[0] += 9
    clock.pause()
    again = logs.Clock({"best": 1.0, "seconds": clock.seconds})
    now[0] += 100
    again.run()
    now[0] += 1
    assert again.now() == 10
