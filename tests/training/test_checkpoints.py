"""Checkpoints are restored bit for bit on any number of devices; a missing or wrong one is an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import state_on

from flaxcap.files.params import CheckpointError, load_params, save_params
from flaxcap.training.checkpoints import Checkpoints


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_saved_on_one_device_restored_on_any_number(tmp_path, devices, ema):
    saved = state_on(1, ema=ema)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, saved, {"best": 1.5}, 2.0)
    checkpoints.wait()
    restored, progress = checkpoints.restore(jax.tree.map(jnp.zeros_like, state_on(devices, ema=ema)))
    checkpoints.close()
    assert progress == {"best": 1.5}
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {devices}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_restored_parameters_are_the_average_if_there_is_one(tmp_path, ema):
    saved = state_on(1, ema=ema)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, saved, {}, 2.0)
    checkpoints.wait()
    expected = saved.params if saved.average is None else saved.average
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(saved.params, 7), expected)
    assert (tmp_path / "7" / "params").is_dir()
    checkpoints.close()


def test_the_best_and_the_newest_are_kept_between_validations_too(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((1, 1.0), (2, 3.0), (3, 2.0), (4, None), (5, 2.5), (6, None)):
        checkpoints.save(step, state_on(1), {}, score)
    checkpoints.wait()
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "6"]
    checkpoints.close()


def test_a_score_of_zero_is_better_than_none(tmp_path):
    """A CIDEr of 0 ranks before checkpoints between validations."""
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((1, None), (2, 0.0), (3, None)):
        checkpoints.save(step, state_on(1), {}, score)
    checkpoints.wait()
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 3)
    checkpoints.close()


def test_before_the_first_validation_the_newest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state_on(1), {}, None)
    checkpoints.wait()
    assert checkpoints.best_step == 3
    checkpoints.close()


def test_a_checkpoint_of_another_shape_is_named_in_the_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state_on(1), {}, 2.0)
    checkpoints.wait()
    with pytest.raises(
        CheckpointError, match=r"7: 1 parameters do not fit.*a/kernel has shape \(4, 3\), expected \(4, 9\)"
    ):
        checkpoints.restore(state_on(1, width=9))
    checkpoints.close()


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.restore(state_on(1))
    checkpoints.close()


def test_params_round_trip_and_overwrite(tmp_path):
    for params in ({"x": {"k": np.arange(6.0).reshape(2, 3)}}, {"y": np.ones(3, np.float32)}):
        save_params(tmp_path / "p", params)
        found = load_params(tmp_path / "p")
        assert jax.tree.structure(found) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, found, params)
        assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))
    with pytest.raises(CheckpointError, match="no parameters"):
        load_params(tmp_path / "absent")
