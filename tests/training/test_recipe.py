"""The recipe's part of a step: noise that does not depend on devices, moving average, rate and baseline."""

from typing import Any

import jax
import numpy as np
import pytest
from small_step import CONFIG, INIT, NOISY, F, V, assert_same, batch, changed, inputs_on, made, step_on

from flaxcap.config import Dropout
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import sharding
from flaxcap.training import step as step_lib


@pytest.fixture(scope="module")
def noisy():
    return step_on(1, config=NOISY)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_draws_the_same_noise(noisy, devices):
    """Dropout masks, attended positions and sampled words depend on the image's index in the complete batch."""
    assert_same(step_on(devices, config=NOISY), noisy)


def test_any_number_of_microbatches_draws_the_same_noise(noisy):
    assert_same(step_on(1, config=changed(NOISY, microbatch_images=2)), noisy)
    _, (_, plain) = step_on(1, steps=2)
    assert abs(noisy[1][1]["loss"] - plain["loss"]) > 0.01  # the run was not the plain one


# Nothing is learned: a step's loss changes only with its noise.
STILL: dict[str, Any] = {"learning_rate": 0.0, "schedule": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("kind", [None, "image", "embedding", "attention", "recurrent", "output"])
def test_each_step_draws_its_own_masks(kind):
    """The loss of the same batch and parameters differs from step to step, and not without dropout."""
    config = changed(**STILL, dropout=Dropout(**{kind: 0.5} if kind else {}))
    mesh = sharding.make_mesh(jax.devices()[:1])
    train_step, state = made(mesh, config)
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, inputs_on(mesh, *batch()))
        losses.append(float(metrics["loss"][0]))
    assert len(set(losses)) == (3 if kind else 1)
    assert float(state.step) == 3


def test_evaluation_draws_nothing():
    """The cross-entropy has no dropout, no sampled words and no additional terms."""
    mesh = sharding.make_mesh(jax.devices()[:2])
    params = jax.device_put(INIT(jax.random.key(0)), sharding.replicated(mesh))
    found = [
        step_lib.make_eval_step(decoder_lib.create(c, decoder_lib.Sizes(64, F, V))[0], mesh, c.train)(
            params, inputs_on(mesh, *batch())
        )
        for c in (CONFIG, NOISY)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_average_of_the_parameters_follows_its_formula():
    """a = d a + (1 - d) p with d = min(ema, (1 + step) / (10 + step)), which is ema = 1/2 from step 8 on."""
    mesh = sharding.make_mesh(jax.devices()[:2])
    train_step, state = made(mesh, changed(ema=0.5, schedule="constant"))
    expected = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, state.average, expected)
    for step in range(12):
        state, _ = train_step(state, inputs_on(mesh, *batch(step)))
        decay = min(0.5, (1 + step) / (10 + step))
        new = jax.device_get(state.params)
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, new)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.average, expected)
    assert state.best_params is state.average
    difference = jax.tree.map(lambda a, p: np.abs(a - p).max(), state.average, state.params)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_without_an_average_the_newest_parameters_are_the_best():
    _, state = made(sharding.make_mesh(jax.devices()[:1]))
    assert state.average is None
    assert state.best_params is state.params


def test_the_rate_multiplies_the_step():
    """It scales the update, weight decay included, and the logged learning rate."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    config = changed(schedule="constant", warmup_steps=0, weight_decay=0.5)
    moved, rates = [], []
    train_step, _ = made(mesh, config)
    for rate in (1.0, 0.25):
        _, state = made(mesh, config)
        before = jax.device_get(state.params)
        state = state._replace(rate=jax.device_put(np.float32(rate), state.rate.sharding))
        state, metrics = train_step(state, inputs_on(mesh, *batch()))
        assert float(state.rate) == rate
        moved.append(jax.tree.map(np.subtract, jax.device_get(state.params), before))
        rates.append(float(metrics["learning_rate"][0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(0.25 * a, b, atol=1e-7), *moved)
    np.testing.assert_allclose(rates, [1e-2, 0.25e-2], rtol=1e-6)


def test_the_baseline_is_a_moving_average_of_a_captions_log_probability(noisy):
    state, metrics = noisy
    log_probs = [-m["nats"] / m["captions"] for m in metrics]
    expected = log_probs[0]
    for log_prob in log_probs[1:]:
        expected = 0.9 * expected + 0.1 * log_prob
    np.testing.assert_allclose(state.baseline, expected, rtol=1e-5)
    assert -200 < expected < -5
