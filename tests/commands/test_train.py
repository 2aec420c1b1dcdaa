"""The loop: it learns, and an interrupted run is the undisturbed run."""

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
def whole(data_dir, tmp_path_factory) -> pathlib.Path:
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    train.train(tiny_config(), workdir, data_dir)
    return workdir


def recipe_config() -> Config:
    """All that has a state or draws something, and an epoch of self-critical training after the others."""
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
    """The same of a run with a long recipe."""
    workdir = tmp_path_factory.mktemp("recipe")
    train.train(recipe_config(), workdir, data_dir)
    return workdir


def final_state(workdir: pathlib.Path, step: int) -> dict:
    """The newest checkpoint as it lies on disk."""
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


def test_the_loss_falls_and_everything_is_written(whole):
    lines = logs.read(whole)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole / "config.json").read_text())["train"]["epochs"] == 3
    assert list(whole.glob("events.out.tfevents.*"))


def test_the_best_checkpoint_is_that_of_the_captions_with_the_highest_cider(data_dir, whole, tmp_path):
    """Of the model's own captions, at the end of each epoch; it is what a run returns, finished or not."""
    scores = {line["step"]: line["val/cider"] for line in logs.read(whole) if "val/cider" in line}
    assert len(scores) == 3
    checkpoints = Checkpoints(whole / "checkpoints")
    assert scores[checkpoints.best_step] == max(scores.values()) > min(scores.values())
    checkpoints.close()
    assert train.train(tiny_config(), whole, data_dir) == max(scores.values()) > 0


def test_a_run_with_an_average_keeps_and_validates_it(recipe):
    """Its checkpoints' parameters are those to caption with; the newest are with what is needed to go on."""
    lines = logs.read(recipe)
    state = final_state(recipe, lines[-1]["step"])
    differences = jax.tree.map(lambda a, p: np.abs(a - p).max(), state["params"], state["rest"]["params"])
    assert min(jax.tree.leaves(differences)) > 1e-6
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    # That of self-critical training, times what the validation scores of the epochs before made of it.
    assert rates[-1] in [pytest.approx(1e-3 * 0.5**n) for n in range(3)]
    assert rates[0] > 5e-3


@pytest.mark.parametrize(
    ("run", "stop"), [("whole", 5), ("whole", 7), ("recipe", 7), ("recipe", 20)], ids=lambda value: str(value)
)
def test_stopped_and_resumed_is_bit_equal_to_undisturbed(data_dir, tmp_path, run, stop, monkeypatch, request):
    """2k steps = k steps, SIGTERM, the same command again, also where a run of batches is cut in two.

    Of the recipe, once before and once amid self-critical training.
    """
    whole = request.getfixturevalue(run)
    config = {"whole": tiny_config, "recipe": recipe_config}[run]
    steps = max(line["step"] for line in logs.read(whole))
    assert 0 < stop < steps
    if run == "recipe":
        assert (stop > steps * 2 // 3) == (stop == 20)
    seen = []

    def interrupt(self, count, metrics, add=MetricWindow.add):
        add(self, count, metrics)
        seen.append(count)
        if sum(seen) >= stop > sum(seen[:-1]):
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with monkeypatch.context() as patch:
        patch.setattr(MetricWindow, "add", interrupt)
        with pytest.raises(Preempted, match=f"step .* of {steps}"):
            train.train(config(), tmp_path, data_dir)
    assert stop <= sum(seen) < steps
    assert max(line["step"] for line in logs.read(tmp_path)) <= sum(seen)
    train.train(config(), tmp_path, data_dir)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, steps), final_state(whole, steps))
    # The line of the steps amid which it was stopped too.
    assert without_times(logs.read(tmp_path)) == without_times(logs.read(whole))


@pytest.mark.parametrize("nth", [0, -1])
def test_a_validation_does_not_make_a_sigterm_wait(data_dir, tmp_path, whole, nth, monkeypatch):
    """The epoch's state is saved without a score, which the same command then finds first."""
    epochs = [line["step"] for line in logs.read(whole) if "epoch" in line]

    def interrupt(self, params, stop, call=validation.Validation.__call__):
        if len([line for line in logs.read(tmp_path) if "epoch" in line]) == nth % len(epochs):
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, params, stop)

    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "__call__", interrupt)
        for _ in range(2):  # the second time before anything else
            with pytest.raises(Preempted, match=f"saved at step {epochs[nth]} of"):
                train.train(tiny_config(), tmp_path, data_dir)
            assert len([line for line in logs.read(tmp_path) if "epoch" in line]) == nth % len(epochs)
    best = train.train(tiny_config(), tmp_path, data_dir)
    assert best == max(line["val/cider"] for line in logs.read(whole) if "epoch" in line)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, epochs[-1]), final_state(whole, epochs[-1]))
    assert without_times(logs.read(tmp_path)) == without_times(logs.read(whole))


def test_the_same_seed_gives_the_same_run_and_another_another(data_dir, whole, tmp_path):
    train.train(tiny_config(), tmp_path / "same", data_dir)
    assert without_times(logs.read(tmp_path / "same")) == without_times(logs.read(whole))
    other = tiny_config()
    other.seed = 1
    train.train(other, tmp_path / "other", data_dir)
    assert without_times(logs.read(tmp_path / "other")) != without_times(logs.read(whole))


def test_streamed_features_give_the_run_of_features_on_the_device(data_dir, whole, tmp_path):
    train.train(tiny_config(features="stream"), tmp_path, data_dir)
    assert without_times(logs.read(tmp_path)) == without_times(logs.read(whole))


@pytest.mark.parametrize("change", [{"microbatch_images": 2}, {"microbatch_images": 3}])
def test_microbatches_give_the_run_of_whole_batches(data_dir, whole, tmp_path, change):
    train.train(tiny_config(**change), tmp_path, data_dir)
    for ours, expected in zip(without_times(logs.read(tmp_path)), without_times(logs.read(whole)), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(data_dir, tmp_path, monkeypatch, capsys):
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


def test_a_finished_run_does_nothing_more_and_more_epochs_go_on(data_dir, tmp_path):
    one = tiny_config(epochs=1, schedule="constant")
    train.train(one, tmp_path, data_dir)
    before = logs.read(tmp_path)
    train.train(one, tmp_path, data_dir)
    assert logs.read(tmp_path) == before
    train.train(tiny_config(epochs=2, schedule="constant"), tmp_path, data_dir)
    assert logs.read(tmp_path)[: len(before)] == before
    assert logs.read(tmp_path)[-1]["epoch"] == 2


def score_with(monkeypatch, *scores: float) -> None:
    """Validation finds these, one after the other."""
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
    """And has ended for good: the same command does nothing more."""
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
def test_a_workdir_of_another_preset_is_refused_and_kept(data_dir, whole, change, message):
    config = tiny_config()
    change(config)
    before = (whole / "config.json").read_text()
    with pytest.raises(ConfigError, match=message):
        train.train(config, whole, data_dir)
    assert (whole / "config.json").read_text() == before


def test_noresume_refuses_a_run_that_is_there(data_dir, whole):
    with pytest.raises(ConfigError, match="holds a run"):
        train.train(tiny_config(), whole, data_dir, resume=False)


def test_without_prepared_features_it_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="flaxcap prepare"):
        train.train(tiny_config(), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_store_with_another_vocabulary_is_refused(data_dir, tmp_path):
    config = tiny_config()
    config.data.vocab_size = 10
    with pytest.raises(StoreError, match=r"vocab_size=50,?\s+not 10"):
        train.train(config, tmp_path, data_dir)
