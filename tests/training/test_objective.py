"""What a recipe adds to the cross-entropy: captions' weights, sampled words, attention that is spread evenly."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_objective import C, F, I, P, T, V, assert_near, at, batch, largest_difference, made, results, sharp

from flaxcap.config import Dropout
from flaxcap.models import dropout
from flaxcap.models.recurrent import NOTHING_DROPPED, Dropped
from flaxcap.text.vocabulary import END, PAD, START, UNK
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch

# Captions and their weights


def test_a_caption_of_weight_zero_is_not_there_for_the_gradient():
    """Reported it is all the same; its image's others keep their part."""
    bind, params = made()
    part = batch()
    unweighted = part._replace(weight_IC=part.weight_IC.at[1, 2].set(0).at[3].set(0))
    without = part._replace(tokens_ICT=part.tokens_ICT.at[1, 2].set(PAD).at[3].set(PAD))
    (total, found), grads = results(bind, params, unweighted)
    (expected, _), expected_grads = results(bind, params, without)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert_near(grads, expected_grads, 1e-6)
    (_, whole), whole_grads = results(bind, params, part)
    np.testing.assert_array_equal(jnp.stack(jax.tree.leaves(found)), jnp.stack(jax.tree.leaves(whole)))
    assert largest_difference(grads, whole_grads) > 0.1


def test_a_negative_weight_makes_a_caption_less_likely():
    """The gradient is linear in the weights."""
    bind, params = made()
    part = batch()
    weight_IC = jnp.asarray(np.random.default_rng(1).uniform(-2, 2, (I, C)), jnp.float32)
    _, plain = results(bind, params, part)
    _, turned = results(bind, params, part._replace(weight_IC=-part.weight_IC))
    assert_near(turned, jax.tree.map(jnp.negative, plain), 1e-6)
    _, weighted = results(bind, params, part._replace(weight_IC=weight_IC))
    _, more = results(bind, params, part._replace(weight_IC=2 * weight_IC + 1))
    assert_near(more, jax.tree.map(lambda w, p: 2 * w + p, weighted, plain), 1e-5)


def test_what_is_reported_is_the_plain_cross_entropy_of_all_captions():
    """Whatever the weights and what a recipe adds; masks alone change it."""
    bind, params = made()
    part = batch()
    weighted = part._replace(weight_IC=-3 * part.weight_IC)
    plain = jax.jit(lambda part: objective.evaluate(bind(params), part))(part)
    (_, found), _ = results(bind, params, weighted, label_smoothing=0.3, doubly_stochastic=1.0)
    np.testing.assert_allclose(jnp.stack(jax.tree.leaves(found)), jnp.stack(jax.tree.leaves(plain)), rtol=1e-6)
    assert found.captions == (part.tokens_ICT[..., 0] == START).sum()
    assert found.sums.tokens == (part.tokens_ICT[..., 1:] != PAD).sum()
    (_, masked), _ = results(bind, params, part, hidden=0.5)
    assert abs(masked.sums.nats - plain.sums.nats) > 0.01 * plain.sums.nats


# Doubly stochastic attention


def test_doubly_stochastic_attention_is_its_formula():
    """Xu et al. 2015, equation 14: each caption that is there adds its weight times sum_p (1 - sum_t alpha_tp)^2."""
    bind, params = made()
    part = batch()
    _, alpha_TICP = bind(params)(part.feats_IPF, part.tokens_ICT[..., :-1])
    expected = 0.0
    for i, c in np.ndindex(I, C):
        length = int((part.tokens_ICT[i, c] != PAD).sum())
        if length:
            expected += ((1 - np.asarray(alpha_TICP)[: length - 1, i, c].sum(0)) ** 2).sum()
    (without, _), _ = results(bind, params, part)
    (total, _), _ = results(bind, params, part, doubly_stochastic=0.7)
    np.testing.assert_allclose(total - without, 0.7 * expected, rtol=1e-4)
    assert expected > 1


# Scheduled sampling


@functools.partial(jax.jit, static_argnums=0)
def _schedule(bind: Any, params: Any, part: Microbatch, share: Any, keys_I: Any, hidden: Dropped) -> jax.Array:
    return objective._scheduled(bind(params), part, hidden, keys_I, share)


def schedule(
    bind: Any, params: Any, part: Microbatch, share: float, seed: int = 0, hidden: Dropped = NOTHING_DROPPED
) -> Any:
    """The tokens that the model is given."""
    keys_I = jax.random.split(jax.random.key(seed), len(part.place_I))
    return np.array(_schedule(bind, params, part, jnp.float32(share), keys_I, hidden))


def biased(params: Any, **bias: float) -> Any:
    """Parameters of a model that says nothing but what it is told to."""
    ids = {"PAD": PAD, "UNK": UNK, "START": START, "END": END, "seven": 7}
    bias_V = np.zeros(V, np.float32)
    bias_V[[ids[name] for name in bias]] = list(bias.values())
    return params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}}


def words_after_the_first(tokens_ICT: Any) -> np.ndarray:
    """What may be replaced: bool [I, C, T - 1], of the given tokens."""
    given_ICT = np.asarray(tokens_ICT)[..., :-1]
    return (given_ICT > END) & (np.arange(T - 1) > 0)


def test_a_share_of_nothing_leaves_the_true_words():
    bind, params = made()
    part = batch()
    np.testing.assert_array_equal(schedule(bind, params, part, 0.0), part.tokens_ICT[..., :-1])
    before = results(bind, params, part, at(done=0.0), scheduled_sampling=0.8)
    assert_near(before[1], results(bind, params, part)[1], 1e-6)
    after = results(bind, params, part, at(done=1.0), scheduled_sampling=0.8)
    assert largest_difference(before[1], after[1]) > 0.01


def test_all_words_are_replaced_but_neither_start_nor_end_nor_padding():
    """By a model that always says the same, they all become that word."""
    bind, params = made()
    part = batch()
    found = schedule(bind, biased(params, seven=1e3), part, 1.0)
    given = np.asarray(part.tokens_ICT[..., :-1])
    np.testing.assert_array_equal(found, np.where(words_after_the_first(part.tokens_ICT), 7, given))
    assert (given == 7).mean() < 0.1


def test_about_the_share_of_the_words_is_replaced():
    bind, params = made()
    params = biased(params, seven=1e3)
    part = batch()
    part = part._replace(tokens_ICT=jnp.full((I, C, T), 8).at[..., 0].set(START))
    found = np.stack([schedule(bind, params, part, 0.3, seed) for seed in range(20)])
    share = (found == 7)[..., 1:].mean()
    assert abs(share - 0.3) < 0.04
    assert len({tokens.tobytes() for tokens in found}) == 20
    assert len({tokens.tobytes() for tokens in found[0].reshape(I * C, -1)}) > 6  # not the same places everywhere


def test_what_is_drawn_is_a_word_whatever_the_model_prefers():
    bind, params = made()
    part = batch()
    found = schedule(bind, biased(params, PAD=50.0, UNK=50.0, START=50.0, END=50.0), part, 1.0)
    drawn = found[words_after_the_first(part.tokens_ICT)]
    assert drawn.min() > END
    assert drawn.max() < V
    assert len(set(drawn.tolist())) > 4


def test_words_are_drawn_with_the_models_probabilities():
    """The second given word, over many images that are alike: what the model says after <start>, words alone."""
    bind, params = made()
    many = 3000
    tokens_ICT = jnp.broadcast_to(jnp.array([START, 8, 9, END]), (many, 1, 4))
    part = Microbatch(
        jnp.broadcast_to(batch().feats_IPF[:1], (many, P, F)), tokens_ICT, jnp.ones((many, 1)), jnp.arange(many)
    )
    found = schedule(bind, params, part, 1.0)
    captioner = bind(params)
    states_TICS, _ = captioner(part.feats_IPF[:1], tokens_ICT[:1, :, :-1])
    expected_V = np.array(jax.nn.softmax(captioner.logits(states_TICS)[0, 0, 0]))
    expected_V[: END + 1] = 0
    drawn_V = np.bincount(found[:, 0, 1], minlength=V) / many
    np.testing.assert_allclose(drawn_V, expected_V / expected_V.sum(), atol=0.03)
    assert expected_V.max() < 0.6


def test_no_gradient_flows_through_what_is_drawn():
    """The gradient is that of the same given words, had they been there from the start."""
    bind, params = made()
    part = batch()
    moment = at()
    keys_I = jax.vmap(lambda i: jax.random.fold_in(moment.key, i))(part.place_I)
    given_ICT = objective._scheduled(bind(params), part, NOTHING_DROPPED, keys_I, jnp.float32(0.6))
    assert 0.2 < (given_ICT != part.tokens_ICT[..., :-1]).mean() < 0.6

    def plain(params: Any) -> jax.Array:
        captioner = bind(params)
        return objective._losses(captioner, captioner(part.feats_IPF, given_ICT)[0], part, 0.0).objective

    expected, expected_grads = jax.jit(jax.value_and_grad(plain))(params)
    (total, _), grads = results(bind, params, part, moment, scheduled_sampling=0.6)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert_near(grads, expected_grads, 1e-5)


def test_the_same_masks_hide_in_both_passes():
    bind, params = made()
    part = batch()
    keys_I = jax.random.split(jax.random.key(3), I)
    hidden = dropout.dropped(bind(params), keys_I, C, T - 1, P, Dropout(output=0.9))
    assert (schedule(bind, params, part, 1.0, hidden=hidden) != schedule(bind, params, part, 1.0)).any()


def test_a_given_word_depends_on_the_true_words_before_it_alone():
    """Where all are replaced. A true word that changes moves what is drawn after it in its own caption, and no more."""
    bind, params = made()
    params = sharp(params)
    params = params | {"word": sharp(params["word"])}  # what is drawn follows the words more than the noise
    part = batch()
    part = part._replace(tokens_ICT=jnp.full((I, C, T), 8).at[..., 0].set(START))
    before = schedule(bind, params, part, 1.0)
    moved = []
    for t in range(T - 1):
        changed = schedule(bind, params, part._replace(tokens_ICT=part.tokens_ICT.at[1, 2, t].set(9 + t)), 1.0)
        if t:
            np.testing.assert_array_equal(changed[1, 2, : t + 1], before[1, 2, : t + 1])
        moved.append((changed[1, 2, t + 1 :] != before[1, 2, t + 1 :]).any())
        changed[1, 2] = before[1, 2]
        np.testing.assert_array_equal(changed, before)
    assert sum(moved) == 4  # nothing comes after the last
