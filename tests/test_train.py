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

from flaxcap import logs, memory, model, train
from flaxcap import train_step as step_lib
from flaxcap.checkpoint import Checkpoints
from flaxcap.config import ConfigError
from flaxcap.store import Store, StoreError


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


@pytest.mark.parametrize("stop", [5, 7])
def test_stopped_and_resumed_is_bit_equal_to_undisturbed(data_dir, whole, tmp_path, stop, monkeypatch):
    """2k steps = k steps, SIGTERM, the same command again, also where a run of batches is cut in two."""
    steps = max(line["step"] for line in logs.read(whole))
    assert 0 < stop < steps
    seen = []

    def interrupt(self, count, metrics, add=train._Window.add):
        add(self, count, metrics)
        seen.append(count)
        if sum(seen) >= stop > sum(seen[:-1]):
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with monkeypatch.context() as patch:
        patch.setattr(train._Window, "add", interrupt)
        with pytest.raises(train.Preempted, match=f"step .* of {steps}"):
            train.train(tiny_config(), tmp_path, data_dir)
    assert stop <= sum(seen) < steps
    assert max(line["step"] for line in logs.read(tmp_path)) <= sum(seen)
    train.train(tiny_config(), tmp_path, data_dir)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, steps), final_state(whole, steps))
    ours = [line for line in without_times(logs.read(tmp_path)) if "val/loss" in line]
    assert ours == [line for line in without_times(logs.read(whole)) if "val/loss" in line]


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
    monkeypatch.setattr(memory, "capacity", lambda _: int(0.8e6 * float(need[1])))
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


def test_best_and_newest_checkpoint_are_kept(data_dir, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train, "validate", lambda *_: (next(losses), 0.0))
    train.train(tiny_config(), tmp_path, data_dir)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    steps = max(line["step"] for line in logs.read(tmp_path))
    assert (checkpoints.best_step, checkpoints.latest_step) == (steps * 2 // 3, steps)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [steps * 2 // 3, steps]
    checkpoints.close()


def test_validation_counts_every_caption_once_whatever_the_batch(data_dir):
    config = tiny_config()
    prepared = Store.finished(data_dir, config)
    vocabulary, split = prepared.vocabulary(), prepared.split("val")
    captions = [text for row in split.rows for text in row.captions]
    tokens = sum(len(vocabulary.encode(text, config.data.max_length)) - 1 for text in captions)
    bind, init = model.create(config, prepared.feature_dim, len(vocabulary))
    found = []
    for images, captions_per_image in ((8, 1), (8, 5), (32, 2)):
        config = tiny_config(batch_images=images, captions_per_image=captions_per_image)
        mesh = step_lib.make_mesh(jax.devices()[:8])
        params = jax.device_put(init(jax.random.key(0)), step_lib.replicated(mesh))
        eval_step = step_lib.make_eval_step(bind, mesh, config.train)
        plan, feed = train.make_feed(config, split, vocabulary, mesh)
        found.append(train.validate(eval_step, params, plan, feed))
        batches = ([plan.in_order(n)] for n in range(plan.steps_per_epoch))
        assert sum(float(eval_step(params, inputs).tokens) for _, inputs in feed.ahead(batches)) == tokens
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-5)


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
