"""Gradient clipping, weight decay, and the learning rates of the decoder, the encoder and self-critical training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxcap.config import Finetune, Train
from flaxcap.training.optimizer import learning_rate, make_optimizer


def test_a_large_gradient_is_clipped():
    unclipped, clipped = Train(clip_norm=0), Train(clip_norm=0.5)
    grads = {"w": jnp.array([30.0, 40.0])}
    for config, norm in ((unclipped, 50), (clipped, 0.5)):
        transform = make_optimizer(config)
        _, state = transform.update(grads, transform.init(grads), rate=1.0)
        (moments,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        np.testing.assert_allclose(optax.tree.norm(moments.mu), norm * (1 - 0.9), rtol=1e-5)


def test_learning_rate_warms_up_and_decays():
    def rates(config: Train, steps: int) -> Callable[[int], float]:
        return lambda step: float(np.asarray(learning_rate(config, steps)(step)))

    cosine = rates(Train(learning_rate=2.0, warmup_steps=10), 100)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10), cosine(55), cosine(100)], [0, 1, 2, 1.02, 0.04])
    constant = rates(Train(learning_rate=2.0, warmup_steps=10, schedule="constant"), 100)
    np.testing.assert_allclose([constant(0), constant(5), constant(10), constant(100)], [0, 1, 2, 2])
    for schedule in ("constant", "cosine"):
        at_once = rates(Train(learning_rate=2.0, warmup_steps=0, schedule=schedule), 100)
        assert at_once(0) == 2.0
    plateau = rates(Train(learning_rate=2.0, warmup_steps=10, schedule="plateau"), 100)
    assert [plateau(n) for n in (0, 5, 10, 100)] == [constant(n) for n in (0, 5, 10, 100)]  # `state.rate` does the rest
    short = rates(Train(learning_rate=2.0, warmup_steps=10), 4)
    assert short(2) == 2.0  # a run shorter than its warm-up still reaches the peak


def test_weight_decay_shrinks_matrices_only_and_is_decoupled_from_the_gradient():
    """Loshchilov & Hutter: decay x weight is added after Adam and before the learning rate."""
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([5.0, -6.0])}
    grads = jax.tree.map(lambda x: 0.1 * x + 1, params)
    updates = []
    for decay in (0.0, 0.3):
        transform = make_optimizer(Train(weight_decay=decay))
        updates.append(transform.update(grads, transform.init(params), params, rate=1.0)[0])
    without, decayed = updates
    np.testing.assert_array_equal(decayed["bias"], without["bias"])
    np.testing.assert_allclose(without["kernel"] - decayed["kernel"], 0.3 * params["kernel"], rtol=1e-4)


def test_fine_tuning_scales_the_updates_of_the_encoder_alone():
    params = {"encoder": {"kernel": jnp.array([[1.0, -2.0]])}, "word": {"kernel": jnp.array([[3.0, 4.0]])}}
    updates = []
    for block in ("", "mixed0"):
        config = Train(learning_rate=1e-2, finetune=Finetune(block=block, learning_rate=1e-3))
        transform = make_optimizer(config)
        updates.append(transform.update(params, transform.init(params), params, rate=0.5)[0])
    plain, tuned = updates
    np.testing.assert_array_equal(tuned["word"]["kernel"], plain["word"]["kernel"])
    np.testing.assert_allclose(tuned["encoder"]["kernel"], 0.1 * plain["encoder"]["kernel"], rtol=1e-6)
    assert (plain["word"]["kernel"] < 0).all()


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


def test_the_state_has_one_structure_for_every_weight_decay_and_clip_norm():
    """A run resumes with another value of either."""
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    structures = {
        jax.tree.structure(make_optimizer(Train(weight_decay=decay, clip_norm=norm)).init(params))
        for decay in (0.0, 0.1)
        for norm in (0.0, 5.0)
    }
    assert len(structures) == 1
