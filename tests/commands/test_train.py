"""`flaxcap train`: it learns, and an interrupted run equals an uninterrupted one."""

import json
import os
import pathlib
import re
import signal
import threading

import jax
import numpy as np
import pytest
from tiny_store import tiny_config, write_store

from flaxcap.commands import train
from flaxcap.config import Config, ConfigError, Dropout
from flaxcap.features.shards import StoreError
from flaxcap.runtime import device_memory
from flaxcap.training import logs, validation
from flaxcap.training.checkpoints import Checkpoints
from flaxcap.training.metric_window import MetricWindow
from flaxcap.training.trainer import Preempted


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    write_store(path, tiny_config())
    return path


@pytest.fixture(scope="module")
def plain(data_dir, tmp_path_factory) -> pathlib.Path:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("plain")
    train.train(tiny_config(), workdir, data_dir)
    return workdir


def recipe_config() -> Config:
    """Returns a preset with every state and every kind of noise, and an epoch of self-critical training."""
    return tiny_config(
        epochs=2,
        cider_epochs=1,
        cider_learning_rate=1e-3,
        schedule="plateau",
        plateau_epochs=1,
        ema=0.9,
        dropout=Dropout(0.1, 0.1, 0.1, 0.1, 0.1),
        scheduled_sampling=0.5,
        label_smoothing=0.1,
        weight_decay=0.1,
    )


@pytest.fixture(scope="module")
def recipe(data_dir, tmp_path_factory) -> pathlib.Path:
    """An uninterrupted run of `recipe_config`."""
    workdir = tmp_path_factory.mktemp("recipe")
    train.train(recipe_config(), workdir, data_dir)
    return workdir


def final_state(workdir: pathlib.Path, step: int) -> dict:
    """Returns the arrays of the newest checkpoint, as Orbax wrote them."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(workdir / "checkpoints")
    assert checkpoints.latest_step == step
    checkpoints.close()
    found = {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "rest"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(workdir / "checkpoints" / str(step) / item).item_metadata.tree
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), tree)
            found[item] = checkpointer.restore(workdir / "checkpoints" / str(step) / item, like)
    return jax.tree.map(np.asarray, found)


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


def test_the_loss_falls_and_everything_is_written(plain):
    lines = logs.read(plain)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3]
    assert (plain / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((plain / "config.json").read_text())["train"]["epochs"] == 3
    assert list(plain.glob("events.out.tfevents.*"))


def test_the_best_checkpoint_has_the_highest_cider(data_dir, plain, tmp_path):
    """The score is the CIDEr of generated captions at the end of an epoch. A finished run returns it again."""
    scores = {line["step"]: line["val/cider"] for line in logs.read(plain) if "val/cider" in line}
    assert len(scores) == 3
    checkpoints = Checkpoints(plain / "checkpoints")
    assert scores[checkpoints.best_step] == max(scores.values()) > min(scores.values())
    checkpoints.close()
    assert train.train(tiny_config(), plain, data_dir) == max(scores.values()) > 0


def test_a_run_with_an_average_keeps_and_validates_it(recipe):
    """A checkpoint's `params` are the average; the newest parameters are in `rest`, for a resumed run."""
    lines = logs.read(recipe)
    state = final_state(recipe, lines[-1]["step"])
    differences = jax.tree.map(lambda a, p: np.abs(a - p).max(), state["params"], state["rest"]["params"])
    assert min(jax.tree.leaves(differences)) > 1e-6
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    # The rate of self-critical training, halved at each plateau of the epochs before.
    assert rates[-1] in [pytest.approx(1e-3 * 0.5**n) for n in range(3)]
    assert rates[0] > 5e-3


@pytest.mark.parametrize(
    ("run", "stop"), [("plain", 5), ("plain", 7), ("recipe", 7), ("recipe", 20)], ids=lambda value: str(value)
)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(data_dir, tmp_path, run, stop, monkeypatch, request):
    """The run gets a SIGTERM after `stop` steps: of the recipe, before and during self-critical training."""
    expected = request.getfixturevalue(run)
    config = {"plain": tiny_config, "recipe": recipe_config}[run]
    steps = max(line["step"] for line in logs.read(expected))
    assert 0 < stop < steps
    if run == "recipe":
        assert (stop > steps * 2 // 3) == (stop == 20)
    counts = []

    def interrupt(self, count, metrics, add=MetricWindow.add):
        add(self, count, metrics)
        counts.append(count)
        if sum(counts) >= stop > sum(counts[:-1]):
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with monkeypatch.context() as patch:
        patch.setattr(MetricWindow, "add", interrupt)
        with pytest.raises(Preempted, match=f"step .* of {steps}"):
            train.train(config(), tmp_path, data_dir)
    assert stop <= sum(counts) < steps
    assert max(line["step"] for line in logs.read(tmp_path)) <= sum(counts)
    train.train(config(), tmp_path, data_dir)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, steps), final_state(expected, steps))
    # Also the line whose steps were interrupted.
    assert without_times(logs.read(tmp_path)) == without_times(logs.read(expected))


@pytest.mark.parametrize("nth", [0, -1])
def test_a_sigterm_interrupts_a_validation(data_dir, tmp_path, plain, nth, monkeypatch):
    """The epoch's state is saved without a score; the same command computes the score first."""
    epochs = [line["step"] for line in logs.read(plain) if "epoch" in line]

    def interrupt(self, params, stop, call=validation.Validation.__call__):
        if len([line for line in logs.read(tmp_path) if "epoch" in line]) == nth % len(epochs):
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, params, stop)

    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "__call__", interrupt)
        for _ in range(2):  # the second time at the start of the resumed run
            with pytest.raises(Preempted, match=f"saved at step {epochs[nth]} of"):
                train.train(tiny_config(), tmp_path, data_dir)
            assert len([line for line in logs.read(tmp_path) if "epoch" in line]) == nth % len(epochs)
    best = train.train(tiny_config(), tmp_path, data_dir)
    assert best == max(line["val/cider"] for line in logs.read(plain) if "epoch" in line)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, epochs[-1]), final_state(plain, epochs[-1]))
    assert without_times(logs.read(tmp_path)) == without_times(logs.read(plain))


def test_equal_seeds_give_equal_runs_and_other_seeds_other_runs(data_dir, plain, tmp_path):
    train.train(tiny_config(), tmp_path / "same", data_dir)
    assert without_times(logs.read(tmp_path / "same")) == without_times(logs.read(plain))
    other = tiny_config()
    other.seed = 1
    train.train(other, tmp_path / "other", data_dir)
    assert without_times(logs.read(tmp_path / "other")) != without_times(logs.read(plain))


def test_streamed_features_give_the_same_run_as_features_on_the_device(data_dir, plain, tmp_path):
    train.train(tiny_config(features="stream"), tmp_path, data_dir)
    assert without_times(logs.read(tmp_path)) == without_times(logs.read(plain))


@pytest.mark.parametrize("change", [{"microbatch_images": 2}, {"microbatch_images": 3}])
def test_microbatches_give_the_same_run_as_complete_batches(data_dir, plain, tmp_path, change):
    train.train(tiny_config(**change), tmp_path, data_dir)
    for ours, expected in zip(without_times(logs.read(tmp_path)), without_times(logs.read(plain)), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)


def test_the_error_of_a_batch_that_does_not_fit_names_the_largest_that_fits(data_dir, tmp_path, monkeypatch, capsys):
    config = tiny_config(batch_images=64, microbatch_images=64, features="stream")
    train.train(config, tmp_path / "fits", data_dir)
    need = re.search(r"a step takes up to ([\d.]+) MB", capsys.readouterr().out)
    assert need
    monkeypatch.setattr(device_memory, "capacity", lambda _: int(0.8e6 * float(need[1])))
    with pytest.raises(ConfigError, match=r"batch_images=64.*the largest that fits is \d+") as refused:
        train.train(config, tmp_path / "not", data_dir)
    config.train.batch_images = int(str(refused.value).split()[-1])
    assert 0 < config.train.batch_images < 64
    config.train.epochs = 1
    train.train(config, tmp_path / "smaller", data_dir)


def test_a_profile_is_written_on_request(data_dir, tmp_path):
    train.train(tiny_config(epochs=1), tmp_path / "run", data_dir, profile_dir=tmp_path / "profile")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_does_nothing_and_more_epochs_resume_it(data_dir, tmp_path):
    one = tiny_config(epochs=1, schedule="constant")
    train.train(one, tmp_path, data_dir)
    before = logs.read(tmp_path)
    train.train(one, tmp_path, data_dir)
    assert logs.read(tmp_path) == before
    train.train(tiny_config(epochs=2, schedule="constant"), tmp_path, data_dir)
    assert logs.read(tmp_path)[: len(before)] == before
    assert logs.read(tmp_path)[-1]["epoch"] == 2


def score_with(monkeypatch, *scores: float) -> None:
    """Makes validations return these scores, one after another."""
    rest = iter(scores)
    monkeypatch.setattr(
        validation.Validation, "__call__", lambda *_: {"loss": 1.0, "accuracy": 0.5, "cider": next(rest)}
    )


def test_best_and_newest_checkpoint_are_kept(data_dir, tmp_path, monkeypatch):
    score_with(monkeypatch, 0.1, 0.3, 0.2)
    assert train.train(tiny_config(), tmp_path, data_dir) == 0.3
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    steps = max(line["step"] for line in logs.read(tmp_path))
    assert (checkpoints.best_step, checkpoints.latest_step) == (steps * 2 // 3, steps)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [steps * 2 // 3, steps]
    checkpoints.close()


def test_a_run_without_progress_slows_down_and_ends(data_dir, tmp_path, monkeypatch):
    """The same command does nothing afterwards."""
    config = tiny_config(epochs=6, schedule="plateau", warmup_steps=0, plateau_epochs=1, stop_after=2)
    score_with(monkeypatch, 0.2, 0.1, 0.15, 0.1)
    assert train.train(config, tmp_path, data_dir) == 0.2
    lines = logs.read(tmp_path)
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3]
    per_epoch = next(line["step"] for line in lines if "epoch" in line)
    for line in lines:
        if "train/learning_rate" in line:
            assert line["train/learning_rate"] == pytest.approx(1e-2 if line["step"] <= 2 * per_epoch else 0.5e-2)
    assert train.train(config, tmp_path, data_dir) == 0.2
    assert logs.read(tmp_path) == lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.model, "cell", "lstm"), "model.cell was gru, is lstm"),
        (lambda c: setattr(c.data, "max_length", 20), "data.max_length was 50, is 20"),
        (lambda c: setattr(c.train, "batch_images", 16), "train.batch_images was 8, is 16"),
    ],
)
def test_a_workdir_of_another_preset_is_an_error_and_stays_as_it_is(data_dir, plain, change, message):
    config = tiny_config()
    change(config)
    before = (plain / "config.json").read_text()
    with pytest.raises(ConfigError, match=message):
        train.train(config, plain, data_dir)
    assert (plain / "config.json").read_text() == before


def test_noresume_refuses_an_existing_run(data_dir, plain):
    with pytest.raises(ConfigError, match="holds a run"):
        train.train(tiny_config(), plain, data_dir, resume=False)


def test_without_a_store_the_error_names_the_remedy(tmp_path):
    with pytest.raises(StoreError, match="flaxcap prepare"):
        train.train(tiny_config(), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_store_with_another_vocabulary_is_refused(data_dir, tmp_path):
    config = tiny_config()
    config.data.vocab_size = 10
    with pytest.raises(StoreError, match="vocab_size=50, expected 10"):
        train.train(config, tmp_path, data_dir)
