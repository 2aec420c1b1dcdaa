"""Losses and gradients that are not finite, and spikes: parameters stay finite, and the log names the step."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CONFIG, NOISY, batch, inputs_on, made
from tiny_store import tiny_config, write_store

from flaxcap.commands import train
from flaxcap.features.store import path_for
from flaxcap.runtime import sharding
from flaxcap.training import logs
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.metric_window import MetricWindow, TooManyBadSteps
from flaxcap.training.trainer import NotFiniteError


@pytest.mark.parametrize("config", [CONFIG, NOISY], ids=["plain", "noisy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_step_that_is_not_finite_changes_only_the_step_number(config, bad):
    mesh = sharding.make_mesh(jax.devices()[:2])
    train_step, state = made(mesh, config)
    state, _ = train_step(state, inputs_on(mesh, *batch(0)))
    before = jax.device_get(state)
    feats_IPF, tokens_ICT = batch(1)
    feats_IPF[3, 5] = bad
    state, metrics = train_step(state, inputs_on(mesh, feats_IPF, tokens_ICT))
    after = jax.device_get(state)
    assert after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), before._replace(step=0))
    assert metrics["skipped"][0] == 1
    assert not np.isfinite(metrics["loss"][0])
    assert [metrics[name][0] for name in ("nats", "tokens", "captions", "grad_norm")] == [0] * 4
    state, metrics = train_step(state, inputs_on(mesh, *batch(2)))
    assert metrics["skipped"][0] == 0
    assert np.isfinite(metrics["loss"][0])
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(state.params), before.params)
    assert min(jax.tree.leaves(changed)) > 0


def of_steps(**columns: Any) -> dict[str, jax.Array]:
    """Returns the metrics of a dispatch. Without `columns` each step has two captions of five tokens."""
    count = len(next(iter(columns.values())))
    names = {"nats": 20.0, "tokens": 10.0, "right": 4.0, "captions": 2.0, "grad_norm": 1.5, "loss": 2.0}
    values = {name: [value] * count for name, value in names.items()} | {"skipped": [0.0] * count}
    return {k: jnp.array(v) for k, v in (values | {"learning_rate": [0.1] * count} | columns).items()}


def window_on(path: pathlib.Path, step: int = 0, progress: dict | None = None, limit: int = 3) -> MetricWindow:
    return MetricWindow(logs.Metrics(path, step), logs.Clock({}), step, limit, progress or {})


BAD = {"skipped": 1.0, "loss": math.nan} | dict.fromkeys(("nats", "tokens", "right", "captions", "grad_norm"), 0.0)


def steps_with(*bad: bool) -> dict[str, jax.Array]:
    good = {name: float(column[0]) for name, column in of_steps(loss=[2.0]).items()}
    return of_steps(**{name: [BAD[name] if b else good[name] for b in bad] for name in BAD})


def test_skipped_steps_are_counted_and_excluded_from_the_means(tmp_path, capsys):
    window = window_on(tmp_path)
    window.add(3, steps_with(False, True, False))
    window.close(3)
    window.write()
    (line,) = logs.read(tmp_path)
    assert line["train/skipped"] == 1
    assert (line["train/loss"], line["train/accuracy"], line["train/grad_norm"]) == (2.0, 0.4, 1.5)
    assert "step 1: loss or gradient is not finite (loss nan); skipped" in capsys.readouterr().out
    window.add(2, steps_with(False, False))
    window.close(5)
    window.write()
    assert "train/skipped" not in logs.read(tmp_path)[-1]


def test_only_enough_bad_steps_in_a_row_end_the_run(tmp_path):
    window = window_on(tmp_path)
    window.add(4, steps_with(True, True, False, True))
    window.close(4)
    window.write()
    # The row continues from the last line, in a resumed run.
    later = window_on(tmp_path, 4, window.progress())
    later.add(2, steps_with(True, True))
    later.close(6)
    with pytest.raises(TooManyBadSteps, match="steps 3 to 5") as found:
        later.write()
    assert (found.value.first, found.value.count) == (3, 3)


def test_a_line_of_self_critical_training_has_the_reward(tmp_path):
    window = window_on(tmp_path)
    window.add(2, of_steps(nats=[20.0, 20.0]) | {"cider_d": np.array([0.5, 1.5], np.float32)})
    window.close(2)
    window.write()
    window.add(1, of_steps(nats=[20.0]))
    window.close(3)
    window.write()
    assert [line.get("train/cider_d") for line in logs.read(tmp_path)] == [1.0, None]


def test_a_line_does_not_depend_on_the_ends_of_dispatches_and_runs(tmp_path):
    rng = np.random.default_rng(0)
    columns = {"nats": rng.uniform(1, 50, 12), "tokens": rng.integers(1, 30, 12), "grad_norm": rng.uniform(size=12)}

    def part(first: int, last: int) -> dict[str, jax.Array]:
        return of_steps(**{name: values[first:last] for name, values in columns.items()})

    single, cut = tmp_path / "single", tmp_path / "cut"
    for path, ends in ((single, [12]), (cut, [3, 4, 9, 12])):
        path.mkdir()
        window, first = window_on(path), 0
        for last in ends:
            window.add(last - first, part(first, last))
            window = window_on(path, last, window.progress())
            first = last
        window.close(12)
        window.write()
    times = {"captions_per_s", "tokens_per_s"}
    a, b = ({k: v for k, v in logs.read(path)[0].items() if k not in times} for path in (single, cut))
    assert a == b


def test_a_spike_is_logged_with_its_step(tmp_path, capsys):
    window = window_on(tmp_path)
    for loss in ([9.0, 2.0], [2.1, 2.9], [3.1, 2.0]):
        window.add(2, of_steps(loss=loss))
        window.close(window._next + 2)
        window.write()
    assert [line.get("train/spikes") for line in logs.read(tmp_path)] == [None, None, 1]
    assert "step 4: loss spike, 3.1000 nats a token; last log line: 2.0000" in capsys.readouterr().out


@pytest.fixture
def data_dir(tmp_path) -> pathlib.Path:
    config = tiny_config()
    write_store(tmp_path / "data", config)
    return tmp_path / "data"


def poison(data_dir: pathlib.Path, rows: slice) -> None:
    """Sets features of these rows to infinity."""
    from flaxcap.features import store

    split = store.Store(path_for(data_dir, tiny_config())).split("train")
    array = split.create_array(64, 6, "bfloat16")
    feats = np.array(array[rows].read().result())
    feats[:, 1] = np.inf  # the first number of a row stays: NaN means never written
    array[rows].write(feats).result()


def test_batches_with_bad_features_are_skipped_and_the_run_ends(data_dir, tmp_path, capsys):
    poison(data_dir, slice(5, 6))
    train.train(tiny_config(), tmp_path / "run", data_dir)
    lines = logs.read(tmp_path / "run")
    skipped = sum(line.get("train/skipped", 0) for line in lines)
    assert skipped == capsys.readouterr().out.count("is not finite") > 0
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_too_many_bad_steps_end_the_run_and_save_the_batch(data_dir, tmp_path):
    config = tiny_config(epochs=1)
    train.train(config, tmp_path / "run", data_dir)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    step = checkpoints.latest_step
    assert step is not None
    checkpoints.close()
    poison(data_dir, slice(0, 40))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=4))
    for _ in range(2):  # the same command ends in the same way
        with pytest.raises(NotFiniteError, match=f"max_bad_steps=2.*steps {step} to {step + 1}.*bad_step_{step}"):
            train.train(longer, tmp_path / "run", data_dir, max_bad_steps=2)
        kept = np.load(tmp_path / "run" / f"bad_step_{step}.npz", allow_pickle=False)
        assert not np.isfinite(kept["feats_IPF"]).all()
        assert kept["tokens_ICT"].shape[0] == len(kept["rows_I"]) == len(kept["files_I"]) == len(kept["feats_IPF"])
        again = Checkpoints(tmp_path / "run" / "checkpoints")
        assert again.latest_step == step
        again.close()
