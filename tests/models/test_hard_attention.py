"""Hard attention: REINFORCE, on average, gives the gradient of the expected log-probability; entropy is rewarded."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_objective import C, F, I, P, T, assert_near, at, batch, largest_difference, made, results, sharp

from flaxcap.config import Dropout, Train
from flaxcap.models import dropout, recurrent
from flaxcap.models.cell import NO_NOISE, Noise
from flaxcap.models.recurrent import Dropped
from flaxcap.text.vocabulary import END, PAD, START
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch

PLACES, WORDS = 3, 2
HARD: dict[str, Any] = {"attention": "hard", "attention_dim": 4, "hidden_dim": 4, "image_dim": 4, "head_dim": 4}


@pytest.fixture
def every_image_is_hard(monkeypatch):
    monkeypatch.setattr(dropout, "HARD_SHARE", 1.0)


def one_word(images: int) -> Microbatch:
    """So many times the same small image, with the same word to be said."""
    feats_PF = np.random.default_rng(2).standard_normal((PLACES, F)).astype(np.float32)
    tokens_ICT = jnp.broadcast_to(jnp.array([START, 6, END]), (images, 1, WORDS + 1))
    feats_IPF = jnp.broadcast_to(feats_PF, (images, PLACES, F))
    return Microbatch(feats_IPF, tokens_ICT, jnp.ones((images, 1)), jnp.arange(images))


def expected_log_prob(bind: Any, params: Any) -> tuple[jax.Array, jax.Array]:
    """Of the caption, over all sequences of places that could be drawn; and the probability of each.

    A sequence is forced, by noise that leaves no other choice; the weights tell its probability.
    """
    captioner = bind(params)
    part = one_word(1)
    found, chances = [], []
    for places in itertools.product(range(PLACES), repeat=WORDS):
        gumbel_TICP = 1e6 * jax.nn.one_hot(jnp.array(places), PLACES)[:, None, None]
        cell = Noise(gumbel_TICP=gumbel_TICP, hard_I=jnp.ones(1, bool))
        states_TICS, alpha_TICP = captioner(part.feats_IPF, part.tokens_ICT[..., :-1], Dropped(cell=cell))
        log_probs_TV = jax.nn.log_softmax(captioner.logits(states_TICS[:, 0, 0]))
        log_prob = log_probs_TV[jnp.arange(WORDS), part.tokens_ICT[0, 0, 1:]].sum()
        chances.append(alpha_TICP[jnp.arange(WORDS), 0, 0, jnp.array(places)].prod())
        found.append(chances[-1] * log_prob)
    return jnp.stack(found).sum(), jnp.stack(chances)


def exactly(bind: Any, params: Any) -> Any:
    """The expected log-probability with the sequences' probabilities, and its gradient."""
    return jax.jit(jax.value_and_grad(functools.partial(expected_log_prob, bind), has_aux=True))(params)


@pytest.mark.usefixtures("every_image_is_hard")
@pytest.mark.parametrize("baseline", [0.0, -6.0])
def test_reinforce_is_on_average_the_gradient_of_the_expected_log_probability(baseline):
    """Over 20 000 draws, to 5% of its largest entry; of any baseline. Without the reward it is another gradient."""
    bind, params = made(seed=1, **HARD)
    params = sharp(params)
    (log_prob, chances), expected = exactly(bind, params)
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-5)
    assert chances.max() < 0.6
    many = 20_000
    found = {}
    for reward in (1.0, 0.0):
        moment = at(baseline=baseline)
        (_, reported), grads = results(bind, params, one_word(many), moment, hard_reward=reward, hard_entropy=0.0)
        found[reward] = jax.tree.map(lambda g: -g / many, grads)
        np.testing.assert_allclose(-reported.sums.nats / many, log_prob, rtol=0.01)
    assert_near(found[1.0], expected, 0.05)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert largest_difference(found[0.0], expected) > 0.1 * largest


@pytest.mark.usefixtures("every_image_is_hard")
def test_the_estimate_of_each_draw_adds_up_to_the_exact_gradient(monkeypatch):
    """No chance left: the estimates of all sequences of places, each as often as it comes."""
    bind, params = made(seed=1, **HARD)
    params = sharp(params)
    (_, chances), expected = exactly(bind, params)
    sequences = jnp.array(list(itertools.product(range(PLACES), repeat=WORDS)))
    gumbel_TICP = 1e6 * jax.nn.one_hot(sequences.T, PLACES)[:, :, None]
    cell = Noise(gumbel_TICP=gumbel_TICP, hard_I=jnp.ones(len(sequences), bool))
    monkeypatch.setattr(dropout, "dropped", lambda *_: Dropped(cell=cell))

    def estimate(params: Any, n: jax.Array) -> jax.Array:
        part = one_word(len(sequences))
        # All but one sequence's image have no caption.
        alone_I = (jnp.arange(len(sequences)) == n)[:, None, None]
        part = part._replace(tokens_ICT=jnp.where(alone_I, part.tokens_ICT, PAD))
        config = Train(hard_reward=1.0, hard_entropy=0.0)
        return objective.objective(bind(params), part, at(baseline=-5.0), config)[0]

    estimates = jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(params, jnp.arange(len(sequences)))
    found = jax.tree.map(lambda x: -jnp.tensordot(chances, x, 1), estimates)
    assert_near(found, expected, 1e-5)


@pytest.mark.usefixtures("every_image_is_hard")
def test_the_entropy_of_the_weights_is_rewarded():
    bind, params = made(seed=1, **HARD)
    part = batch()
    _, alpha_TICP = bind(params)(part.feats_IPF, part.tokens_ICT[..., :-1], _hidden(bind(params), part))
    real_TIC = np.moveaxis(np.asarray(part.tokens_ICT[..., 1:] != PAD), 2, 0)
    entropy = -(np.asarray(alpha_TICP * jnp.log(alpha_TICP)).sum(-1) * real_TIC).sum()
    totals = [results(bind, params, part, hard_reward=0.0, hard_entropy=weight)[0][0] for weight in (0.0, 0.5)]
    np.testing.assert_allclose(totals[0] - totals[1], 0.5 * entropy, rtol=1e-4)
    assert entropy > 1


def _hidden(captioner: recurrent.Captioner, part: Microbatch) -> Dropped:
    """What `objective` draws at the start of its run."""
    keys_I = jax.vmap(lambda i: jax.random.fold_in(at().key, i))(part.place_I)
    return dropout.dropped(captioner, keys_I, C, T - 1, P, Dropout())


def test_soft_images_have_no_reward(monkeypatch):
    """Those that look at the weighted sum have their gradient already."""
    monkeypatch.setattr(dropout, "HARD_SHARE", 0.0)
    bind, params = made(seed=1, **HARD)
    soft, _ = made(seed=1, **HARD | {"attention": "soft"})
    part = batch()
    _, grads = results(bind, params, part, hard_reward=5.0, hard_entropy=0.0)
    assert_near(grads, results(soft, params, part)[1], 1e-6)
    assert dropout.dropped(soft(params), jax.random.split(jax.random.key(0), I), C, T, P, Dropout()).cell == NO_NOISE
