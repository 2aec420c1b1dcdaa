"""The objective: captions' weights, scheduled sampling, doubly stochastic attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_objective import (
    C,
    F,
    I,
    P,
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

from flaxcap.config import Dropout
from flaxcap.models.recurrent import NO_NOISE, Noise
from flaxcap.text.vocabulary import END, PAD, START, UNK
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch

# Captions and their weights


def test_a_caption_of_weight_zero_has_no_gradient():
    """The logged sums still count it. The image's other captions keep their gradients."""
    bind, params = make()
    microbatch = batch()
    unweighted = microbatch._replace(weight_IC=microbatch.weight_IC.at[1, 2].set(0).at[3].set(0))
    without = microbatch._replace(tokens_ICT=microbatch.tokens_ICT.at[1, 2].set(PAD).at[3].set(PAD))
    (total, found), grads = results(bind, params, unweighted)
    (expected, _), expected_grads = results(bind, params, without)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert_near(grads, expected_grads, 1e-6)
    (_, full), full_grads = results(bind, params, microbatch)
    np.testing.assert_array_equal(jnp.stack(jax.tree.leaves(found)), jnp.stack(jax.tree.leaves(full)))
    assert largest_difference(grads, full_grads) > 0.1


def test_a_negative_weight_makes_a_caption_less_likely():
    """The gradient is linear in the weights."""
    bind, params = make()
    microbatch = batch()
    weight_IC = jnp.asarray(np.random.default_rng(1).uniform(-2, 2, (I, C)), jnp.float32)
    _, plain = results(bind, params, microbatch)
    _, turned = results(bind, params, microbatch._replace(weight_IC=-microbatch.weight_IC))
    assert_near(turned, jax.tree.map(jnp.negative, plain), 1e-6)
    _, weighted = results(bind, params, microbatch._replace(weight_IC=weight_IC))
    _, more = results(bind, params, microbatch._replace(weight_IC=2 * weight_IC + 1))
    assert_near(more, jax.tree.map(lambda w, p: 2 * w + p, weighted, plain), 1e-5)


def test_the_logged_sums_are_the_plain_cross_entropy_of_all_captions():
    """Neither weights nor additional terms change them. Dropout does."""
    bind, params = make()
    microbatch = batch()
    weighted = microbatch._replace(weight_IC=-3 * microbatch.weight_IC)
    plain = jax.jit(lambda microbatch: objective.evaluate(bind(params), microbatch))(microbatch)
    (_, found), _ = results(bind, params, weighted, label_smoothing=0.3, doubly_stochastic=1.0)
    np.testing.assert_allclose(jnp.stack(jax.tree.leaves(found)), jnp.stack(jax.tree.leaves(plain)), rtol=1e-6)
    assert found.captions == (microbatch.tokens_ICT[..., 0] == START).sum()
    assert found.sums.tokens == (microbatch.tokens_ICT[..., 1:] != PAD).sum()
    (_, masked), _ = results(bind, params, microbatch, output_dropout=0.5)
    assert abs(masked.sums.nats - plain.sums.nats) > 0.01 * plain.sums.nats


# Doubly stochastic attention


def test_doubly_stochastic_attention_equals_its_formula():
    """Each caption that is present adds sum_p (1 - sum_t alpha_tp)² (Xu et al. 2015, equation 14)."""
    bind, params = make()
    microbatch = batch()
    _, alpha_TICP = bind(params)(microbatch.feats_IPF, microbatch.tokens_ICT[..., :-1])
    expected = 0.0
    for i, c in np.ndindex(I, C):
        length = int((microbatch.tokens_ICT[i, c] != PAD).sum())
        if length:
            expected += ((1 - np.asarray(alpha_TICP)[: length - 1, i, c].sum(0)) ** 2).sum()
    (without, _), _ = results(bind, params, microbatch)
    (total, _), _ = results(bind, params, microbatch, doubly_stochastic=0.7)
    np.testing.assert_allclose(total - without, 0.7 * expected, rtol=1e-4)
    assert expected > 1


# Scheduled sampling


@functools.partial(jax.jit, static_argnums=0)
def _schedule(bind: Any, params: Any, microbatch: Microbatch, share: Any, keys_I: Any, noise: Noise) -> jax.Array:
    return objective._scheduled(bind(params), microbatch, noise, keys_I, share)


def schedule(
    bind: Any, params: Any, microbatch: Microbatch, share: float, seed: int = 0, noise: Noise = NO_NOISE
) -> np.ndarray:
    """Returns the given tokens after scheduled sampling, `[I, C, T - 1]`."""
    keys_I = jax.random.split(jax.random.key(seed), len(microbatch.index_I))
    return np.array(_schedule(bind, params, microbatch, jnp.float32(share), keys_I, noise))


def biased(params: Any, **bias: float) -> Any:
    """Returns parameters with these biases of tokens, and biases of 0 for all others."""
    ids = {"PAD": PAD, "UNK": UNK, "START": START, "END": END, "seven": 7}
    bias_V = np.zeros(V, np.float32)
    bias_V[[ids[name] for name in bias]] = list(bias.values())
    return params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}}


def words_after_the_first(tokens_ICT: Any) -> np.ndarray:
    """Returns the given tokens that may be replaced: bool `[I, C, T - 1]`."""
    given_ICT = np.asarray(tokens_ICT)[..., :-1]
    return (given_ICT > END) & (np.arange(T - 1) > 0)


def test_a_share_of_zero_keeps_the_true_words():
    bind, params = make()
    microbatch = batch()
    np.testing.assert_array_equal(schedule(bind, params, microbatch, 0.0), microbatch.tokens_ICT[..., :-1])
    before = results(bind, params, microbatch, step_context(done=0.0), scheduled_sampling=0.8)
    assert_near(before[1], results(bind, params, microbatch)[1], 1e-6)
    after = results(bind, params, microbatch, step_context(done=1.0), scheduled_sampling=0.8)
    assert largest_difference(before[1], after[1]) > 0.01


def test_a_share_of_one_replaces_all_words_but_neither_start_nor_end_nor_padding():
    """The decoder always predicts the same word, so every word becomes that word."""
    bind, params = make()
    microbatch = batch()
    found = schedule(bind, biased(params, seven=1e3), microbatch, 1.0)
    given = np.asarray(microbatch.tokens_ICT[..., :-1])
    np.testing.assert_array_equal(found, np.where(words_after_the_first(microbatch.tokens_ICT), 7, given))
    assert (given == 7).mean() < 0.1


def test_about_the_share_of_the_words_is_replaced():
    bind, params = make()
    params = biased(params, seven=1e3)
    microbatch = batch()
    microbatch = microbatch._replace(tokens_ICT=jnp.full((I, C, T), 8).at[..., 0].set(START))
    found = np.stack([schedule(bind, params, microbatch, 0.3, seed) for seed in range(20)])
    share = (found == 7)[..., 1:].mean()
    assert abs(share - 0.3) < 0.04
    assert len({tokens.tobytes() for tokens in found}) == 20
    # Captions differ in the tokens that are replaced.
    assert len({tokens.tobytes() for tokens in found[0].reshape(I * C, -1)}) > 6


def test_only_words_are_drawn_even_if_the_decoder_prefers_special_tokens():
    bind, params = make()
    microbatch = batch()
    found = schedule(bind, biased(params, PAD=50.0, UNK=50.0, START=50.0, END=50.0), microbatch, 1.0)
    drawn = found[words_after_the_first(microbatch.tokens_ICT)]
    assert drawn.min() > END
    assert drawn.max() < V
    assert len(set(drawn.tolist())) > 4


def test_words_are_drawn_with_the_decoders_probabilities():
    """Counts the second given token of many equal images: the decoder's prediction after <start>, words alone."""
    bind, params = make()
    many = 3000
    tokens_ICT = jnp.broadcast_to(jnp.array([START, 8, 9, END]), (many, 1, 4))
    microbatch = Microbatch(
        jnp.broadcast_to(batch().feats_IPF[:1], (many, P, F)), tokens_ICT, jnp.ones((many, 1)), jnp.arange(many)
    )
    found = schedule(bind, params, microbatch, 1.0)
    decoder = bind(params)
    states_TICS, _ = decoder(microbatch.feats_IPF[:1], tokens_ICT[:1, :, :-1])
    expected_V = np.array(jax.nn.softmax(logits(decoder, states_TICS)[0, 0, 0]))
    expected_V[: END + 1] = 0
    drawn_V = np.bincount(found[:, 0, 1], minlength=V) / many
    np.testing.assert_allclose(drawn_V, expected_V / expected_V.sum(), atol=0.03)
    assert expected_V.max() < 0.6


def test_no_gradient_flows_through_the_drawn_words():
    """The gradient equals that of the same tokens given without sampling."""
    bind, params = make()
    microbatch = batch()
    context = step_context()
    keys_I = context.keys(microbatch)
    given_ICT = objective._scheduled(bind(params), microbatch, NO_NOISE, keys_I, jnp.float32(0.6))
    assert 0.2 < (given_ICT != microbatch.tokens_ICT[..., :-1]).mean() < 0.6

    def plain(params: Any) -> jax.Array:
        decoder = bind(params)
        return objective._losses(decoder, decoder(microbatch.feats_IPF, given_ICT)[0], microbatch, 0.0).objective

    expected, expected_grads = jax.jit(jax.value_and_grad(plain))(params)
    (total, _), grads = results(bind, params, microbatch, context, scheduled_sampling=0.6)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert_near(grads, expected_grads, 1e-5)


def test_the_pass_that_draws_words_uses_the_steps_masks():
    bind, params = make()
    microbatch = batch()
    keys_I = jax.random.split(jax.random.key(3), I)
    noise = bind(params).draw_noise(keys_I, C, T - 1, Dropout(output=0.9))
    assert (schedule(bind, params, microbatch, 1.0, noise=noise) != schedule(bind, params, microbatch, 1.0)).any()


def test_a_drawn_word_depends_on_the_true_words_before_it_alone():
    """A changed true word changes only words that are drawn after it, in its own caption."""
    bind, params = make()
    params = sharpened(params)
    # The drawn words must depend more on the given words than on the noise.
    params = params | {"word": sharpened(params["word"])}
    microbatch = batch()
    tokens_ICT = jnp.full((I, C, T), 8).at[..., 0].set(START)
    before = schedule(bind, params, microbatch._replace(tokens_ICT=tokens_ICT), 1.0)
    moved = []
    for t in range(T - 1):
        other_ICT = tokens_ICT.at[1, 2, t].set(9 + t)
        changed = schedule(bind, params, microbatch._replace(tokens_ICT=other_ICT), 1.0)
        if t:
            np.testing.assert_array_equal(changed[1, 2, : t + 1], before[1, 2, : t + 1])
        moved.append((changed[1, 2, t + 1 :] != before[1, 2, t + 1 :]).any())
        changed[1, 2] = before[1, 2]
        np.testing.assert_array_equal(changed, before)
    assert sum(moved) == 4  # no word comes after the last token
