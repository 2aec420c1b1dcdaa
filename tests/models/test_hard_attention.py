"""Hard attention: REINFORCE gives the gradient of the expected log-probability on average; entropy is rewarded."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_objective import (
    C,
    F,
    I,
    T,
    V,
    assert_near,
    batch,
    largest_difference,
    logits,
    make,
    results,
    sharpened,
    step_context,
)

from flaxcap.config import Dropout, Train
from flaxcap.models import hard_attention
from flaxcap.models.cell import NO_CELL_NOISE, CellNoise
from flaxcap.models.decoder import Sizes
from flaxcap.models.recurrent import Noise, RecurrentDecoder
from flaxcap.text.vocabulary import END, PAD, START
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch

POSITIONS, WORDS = 3, 2
HARD: dict[str, Any] = {"attention": "hard", "attention_dim": 4, "hidden_dim": 4, "image_dim": 4, "head_dim": 4}


@pytest.fixture
def every_image_is_hard(monkeypatch):
    monkeypatch.setattr(hard_attention, "HARD_SHARE", 1.0)


def make_small() -> tuple[Any, Any]:
    """Returns a bind for images of `POSITIONS` positions, and its parameters."""
    bind, params = make(1, Sizes(POSITIONS, F, V), **HARD)
    return bind, sharpened(params)


def one_word(images: int) -> Microbatch:
    """Returns the same small image many times, each time with the same caption of one word."""
    feats_PF = np.random.default_rng(2).standard_normal((POSITIONS, F)).astype(np.float32)
    tokens_ICT = jnp.broadcast_to(jnp.array([START, 6, END]), (images, 1, WORDS + 1))
    feats_IPF = jnp.broadcast_to(feats_PF, (images, POSITIONS, F))
    return Microbatch(feats_IPF, tokens_ICT, jnp.ones((images, 1)), jnp.arange(images))


def expected_log_prob(bind: Any, params: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the caption's expected log-probability, and the probability of each sequence of positions.

    Large Gumbel noise forces each sequence. The attention weights along it give its probability.
    """
    decoder = bind(params)
    microbatch = one_word(1)
    terms, probabilities = [], []
    for positions in itertools.product(range(POSITIONS), repeat=WORDS):
        gumbel_TICP = 1e6 * jax.nn.one_hot(jnp.array(positions), POSITIONS)[:, None, None]
        cell = CellNoise(gumbel_TICP=gumbel_TICP, hard_I=jnp.ones(1, bool))
        states_TICS, alpha_TICP = decoder(microbatch.feats_IPF, microbatch.tokens_ICT[..., :-1], Noise(cell=cell))
        log_probs_TV = jax.nn.log_softmax(logits(decoder, states_TICS[:, 0, 0]))
        log_prob = log_probs_TV[jnp.arange(WORDS), microbatch.tokens_ICT[0, 0, 1:]].sum()
        probabilities.append(alpha_TICP[jnp.arange(WORDS), 0, 0, jnp.array(positions)].prod())
        terms.append(probabilities[-1] * log_prob)
    return jnp.stack(terms).sum(), jnp.stack(probabilities)


def exact(bind: Any, params: Any) -> Any:
    """Returns the results of `expected_log_prob`, and the gradients of the expected log-probability."""
    return jax.jit(jax.value_and_grad(functools.partial(expected_log_prob, bind), has_aux=True))(params)


@pytest.mark.usefixtures("every_image_is_hard")
@pytest.mark.parametrize("baseline", [0.0, -6.0])
def test_reinforce_is_on_average_the_gradient_of_the_expected_log_probability(baseline):
    """Over 20 000 draws and with any baseline, to 5% of the largest entry. Without the reward it is far from it."""
    bind, params = make_small()
    (log_prob, probabilities), expected = exact(bind, params)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    assert probabilities.max() < 0.6
    many = 20_000
    found = {}
    for reward in (1.0, 0.0):
        context = step_context(baseline=baseline)
        (_, found_sums), grads = results(bind, params, one_word(many), context, hard_reward=reward, hard_entropy=0.0)
        found[reward] = jax.tree.map(lambda g: -g / many, grads)
        np.testing.assert_allclose(-found_sums.sums.nats / many, log_prob, rtol=0.01)
    assert_near(found[1.0], expected, 0.05)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert largest_difference(found[0.0], expected) > 0.1 * largest


@pytest.mark.usefixtures("every_image_is_hard")
def test_the_estimates_weighted_by_their_probabilities_are_the_exact_gradient(monkeypatch):
    """Nothing is random here: each sequence of positions gives one estimate."""
    bind, params = make_small()
    (_, probabilities), expected = exact(bind, params)
    sequences = jnp.array(list(itertools.product(range(POSITIONS), repeat=WORDS)))
    gumbel_TICP = 1e6 * jax.nn.one_hot(sequences.T, POSITIONS)[:, :, None]
    cell = CellNoise(gumbel_TICP=gumbel_TICP, hard_I=jnp.ones(len(sequences), bool))
    monkeypatch.setattr(RecurrentDecoder, "draw_noise", lambda *_: Noise(cell=cell))

    def estimate(params: Any, n: jax.Array) -> jax.Array:
        microbatch = one_word(len(sequences))
        # Only the image of sequence n has a caption.
        alone_I11 = (jnp.arange(len(sequences)) == n)[:, None, None]
        microbatch = microbatch._replace(tokens_ICT=jnp.where(alone_I11, microbatch.tokens_ICT, PAD))
        config = Train(hard_reward=1.0, hard_entropy=0.0)
        return objective.objective(bind(params), microbatch, step_context(baseline=-5.0), config)[0]

    estimates = jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(params, jnp.arange(len(sequences)))
    found = jax.tree.map(lambda x: -jnp.tensordot(probabilities, x, 1), estimates)
    assert_near(found, expected, 1e-5)


@pytest.mark.usefixtures("every_image_is_hard")
def test_the_entropy_of_the_weights_is_rewarded():
    bind, params = make(seed=1, **HARD)
    decoder, microbatch = bind(params), batch()
    noise = decoder.draw_noise(step_context().keys(microbatch), C, T - 1, Dropout())
    _, alpha_TICP = decoder(microbatch.feats_IPF, microbatch.tokens_ICT[..., :-1], noise)
    real_TIC = np.moveaxis(np.asarray(microbatch.tokens_ICT[..., 1:] != PAD), 2, 0)
    entropy = -(np.asarray(alpha_TICP * jnp.log(alpha_TICP)).sum(-1) * real_TIC).sum()
    totals = [results(bind, params, microbatch, hard_reward=0.0, hard_entropy=weight)[0][0] for weight in (0.0, 0.5)]
    np.testing.assert_allclose(totals[0] - totals[1], 0.5 * entropy, rtol=1e-4)
    assert entropy > 1


def test_soft_images_have_no_reward(monkeypatch):
    """The weighted sum already has a gradient."""
    monkeypatch.setattr(hard_attention, "HARD_SHARE", 0.0)
    bind, params = make(seed=1, **HARD)
    soft, _ = make(seed=1, **HARD | {"attention": "soft"})
    microbatch = batch()
    _, grads = results(bind, params, microbatch, hard_reward=5.0, hard_entropy=0.0)
    assert_near(grads, results(soft, params, microbatch)[1], 1e-6)
    noise = soft(params).draw_noise(jax.random.split(jax.random.key(0), I), C, T, Dropout())
    assert noise.cell == NO_CELL_NOISE
