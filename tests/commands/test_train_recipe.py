"""What a recipe adds to the step: draws that no device changes, an average, a rate, weight decay, a baseline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CONFIG, INIT, NOISY, F, V, assert_same, batch, changed, inputs_on, made, step_on

from flaxcap.config import Dropout, Train
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import sharding
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer


@pytest.fixture(scope="module")
def noisy():
    return step_on(1, config=NOISY)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_draws_the_same(noisy, devices):
    """Masks, places and words are drawn image by image, by its place in the whole batch."""
    assert_same(step_on(devices, config=NOISY), noisy)


def test_any_number_of_microbatches_draws_the_same(noisy):
    assert_same(step_on(1, config=changed(NOISY, microbatch_images=2)), noisy)
    _, (_, plain) = step_on(1, steps=2)
    assert abs(noisy[1][1]["loss"] - plain["loss"]) > 0.01  # it was not the plain run


# Nothing is learned: what a step reports tells what it drew.
STILL: dict[str, Any] = {"learning_rate": 0.0, "schedule": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("kind", [None, "image", "embedding", "attention", "recurrent", "output"])
def test_each_step_draws_its_own_masks(kind):
    """The same batch with the same parameters has another loss at each step; where nothing is dropped, the same."""
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
    """Neither masks nor places nor words; and what a recipe adds is not in the cross-entropy."""
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
    """a = d a + (1 - d) p, d = min(ema, (1 + step) / (10 + step)): half after eight steps, and then no more."""
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
    """What a schedule that follows validation sets: of the update, weight decay included, and of what is reported."""
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


def test_weight_decay_shrinks_matrices_alone_and_beside_the_gradient():
    """Loshchilov & Hutter: decay x weight, before the learning rate, whatever Adam makes of the gradient."""
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([5.0, -6.0])}
    grads = jax.tree.map(lambda x: 0.1 * x + 1, params)
    updates = []
    for decay in (0.0, 0.3):
        transform = make_optimizer(Train(weight_decay=decay))
        updates.append(transform.update(grads, transform.init(params), params, rate=1.0)[0])
    without, decayed = updates
    np.testing.assert_array_equal(decayed["bias"], without["bias"])
    np.testing.assert_allclose(without["kernel"] - decayed["kernel"], 0.3 * params["kernel"], rtol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
def test_self_critical_training_has_a_learning_rate_of_its_own(schedule):
    options: dict[str, Any] = {"learning_rate": 2.0, "warmup_steps": 10, "schedule": schedule}
    found = learning_rate(Train(**options, cider_learning_rate=0.5), 100, 50)
    before = learning_rate(Train(**options), 100)
    for step in (0, 10, 99):
        np.testing.assert_allclose(found(step), before(step))
    expected = [0.5, 0.255, 0.01, 0.01] if schedule == "cosine" else [0.5] * 4
    np.testing.assert_allclose(np.array([found(step) for step in (100, 125, 150, 500)]), expected, rtol=1e-6)
    alone = learning_rate(Train(**options, epochs=0, cider_learning_rate=0.5), 0, 50)
    np.testing.assert_allclose(np.array([alone(step) for step in (0, 25, 50, 500)]), expected, rtol=1e-6)
