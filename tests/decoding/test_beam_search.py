"""Beam search against a plain beam search, against all possible captions, and against teacher forcing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_decoding import FEATS_IPF, MODELS, Ensemble, I, Small, T, V, caption, plain_beam_search, small

from flaxcap.decoding import beam_search
from flaxcap.decoding.constraints import Constraints
from flaxcap.decoding.step import FIRST_WORD
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import END, PAD, START, UNK

FREE = Constraints(T)


def repeats(tokens: tuple[int, ...], n: int) -> bool:
    runs = list(zip(*[tokens[k:] for k in range(n)], strict=False))
    return len(set(runs)) < len(runs)


@pytest.mark.parametrize("options", [*MODELS, {"dtype": "bfloat16"}, {"matmul_dtype": "bfloat16"}])
def test_a_beam_of_width_one_equals_greedy_decoding(options):
    of = small(**options)
    greedy = of.run(method="greedy")
    found = of.run(beam_width=1, length_penalty=1.5)
    assert len({len(caption(t)) for t in greedy.tokens_IT}) > 2  # the captions have different lengths
    assert (found.tokens_IT == greedy.tokens_IT).all()
    np.testing.assert_allclose(found.log_prob_I, greedy.log_prob_I, rtol=1e-5)
    np.testing.assert_allclose(found.alpha_ITP, greedy.alpha_ITP, atol=1e-6)


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize(("width", "penalty", "n"), [(2, 0.0, 0), (5, 0.6, 2)])
def test_it_finds_the_captions_of_a_plain_beam_search(options, width, penalty, n):
    of = small(**options)
    found = of.run(beam_width=width, length_penalty=penalty, no_repeat_ngram=n)
    for i in range(I):
        tokens, log_prob = plain_beam_search(of, i, width, penalty, Constraints(T, no_repeat_ngram=n))
        assert caption(found.tokens_IT[i]) == tokens
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)


def test_an_ensemble_finds_the_captions_of_a_plain_beam_search_over_mean_probabilities():
    """Its attention weights are the means of its members' weights along the best caption."""
    of = Ensemble(*(small(**options) for options in MODELS))
    found = of.run(beam_width=3, length_penalty=1.0)
    for i in range(I):
        tokens, log_prob = plain_beam_search(of, i, 3, 1.0, FREE)
        assert caption(found.tokens_IT[i]) == tokens
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)
        np.testing.assert_allclose(found.alpha_ITP[i, : len(tokens)], of.follow(i, tokens[:-1])[1], atol=1e-5)
    alone = [m.run(beam_width=3, length_penalty=1.0).tokens_IT for m in of.members]
    assert all((found.tokens_IT != tokens_IT).any() for tokens_IT in alone)


def test_a_deep_and_tied_decoder_finds_the_captions_of_a_plain_beam_search():
    of = small(output="deep", tied=True, head_dim=5, seed=4)
    found = of.run(beam_width=3)
    for i in range(I):
        tokens, log_prob = plain_beam_search(of, i, 3, 0.0, FREE)
        assert caption(found.tokens_IT[i]) == tokens
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)
    assert len({caption(t) for t in found.tokens_IT}) > 3


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_a_beam_as_wide_as_the_number_of_captions_finds_the_best_caption(penalty):
    length, words = 4, range(END + 1, 7)
    of = Small(7, seed=22, end=0.0)
    every = [(*some, END) for n in range(length) for some in itertools.product(words, repeat=n)]
    narrow, wide = (of.run(beam_width=k, max_length=length, length_penalty=penalty) for k in (2, len(every)))
    best = []
    for i in range(I):
        scores = {}
        for tokens in every:
            log_probs = of.follow(i, tokens[:-1], length)[0]
            scores[tokens] = float(log_probs[range(len(tokens)), tokens].sum()) / len(tokens) ** penalty
        best.append(max(scores, key=scores.__getitem__))
        assert caption(wide.tokens_IT[i]) == best[-1]
        np.testing.assert_allclose(wide.log_prob_I[i], scores[best[-1]] * len(best[-1]) ** penalty, rtol=1e-4)
        assert scores[caption(narrow.tokens_IT[i])] <= scores[best[-1]]
    assert len(set(best)) > 1


def test_a_greater_length_penalty_finds_longer_captions():
    lengths = [
        sum(len(caption(t)) for t in small().run(beam_width=5, length_penalty=penalty).tokens_IT)
        for penalty in (0.0, 1.0, 4.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


@pytest.mark.parametrize("options", [{}, {"beam_width": 6, "length_penalty": 1.0, "no_repeat_ngram": 2}])
def test_an_images_caption_does_not_depend_on_the_batch_or_the_devices(options):
    together = small().run(**options)
    assert len({len(caption(t)) for t in together.tokens_IT}) > 1
    for i in range(I):
        alone = small().run(FEATS_IPF[i : i + 1], **options)
        assert (alone.tokens_IT[0] == together.tokens_IT[i]).all()
        np.testing.assert_allclose(alone.log_prob_I[0], together.log_prob_I[i], rtol=1e-4)
        np.testing.assert_allclose(alone.alpha_ITP[0], together.alpha_ITP[i], atol=1e-5)
    mesh = sharding.make_mesh()
    assert mesh.size == I
    params = jax.device_put(small().params, sharding.replicated(mesh))
    spread = small().run(jax.device_put(FEATS_IPF, sharding.over_images(mesh)), params, **options)
    assert (spread.tokens_IT == together.tokens_IT).all()
    np.testing.assert_allclose(spread.alpha_ITP, together.alpha_ITP, atol=1e-5)


@pytest.mark.parametrize("options", MODELS)
def test_attention_and_log_probability_equal_teacher_forcing(options):
    of = small(**options)
    found = of.run(beam_width=4, length_penalty=1.0)
    assert found.alpha_ITP.shape == (I, T, 64)
    for i in range(I):
        tokens = caption(found.tokens_IT[i])
        log_probs, alpha = of.follow(i, tokens[:-1])
        np.testing.assert_allclose(found.log_prob_I[i], log_probs[range(len(tokens)), tokens].sum(), rtol=1e-4)
        np.testing.assert_allclose(found.alpha_ITP[i, : len(tokens)], alpha, atol=1e-5)
        np.testing.assert_allclose(found.alpha_ITP[i, : len(tokens)].sum(-1), 1, rtol=1e-5)
        assert not found.alpha_ITP[i, len(tokens) :].any()
    # Every image has different weights: the comparison above is not of constants.
    assert len({alpha.tobytes() for alpha in found.alpha_ITP[:, 1]}) == I


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_run_of_words_occurs_twice(n):
    longer = small().biased(END=-1000.0)
    free, blocked = (small().run(params=longer, max_length=16, no_repeat_ngram=k) for k in (0, n))
    assert any(repeats(caption(t), n) for t in free.tokens_IT)
    assert not any(repeats(caption(t), n) for t in blocked.tokens_IT)
    assert {len(caption(t)) for t in blocked.tokens_IT} == {16}  # no caption is short


def test_a_caption_ends_when_every_word_would_repeat():
    of = Small(6)
    found = of.run(params=of.biased(END=-50.0), beam_width=1, no_repeat_ngram=1)
    assert {len(caption(t)) for t in found.tokens_IT} == {3}  # both words, <end>


def test_a_run_longer_than_any_caption_blocks_nothing():
    for n in (T - 1, T, T + 1):
        assert (small().run(no_repeat_ngram=n).tokens_IT == small().run().tokens_IT).all()


@pytest.mark.parametrize("width", [1, 50])
@pytest.mark.parametrize("bias", [{}, {"PAD": 1e4, "UNK": 1e4, "START": 1e4}, {"END": -1e4}])
@pytest.mark.parametrize("length", [1, T])
def test_captions_hold_words_then_one_end_then_padding(width, bias, length):
    found = small().run(params=small().biased(**bias), beam_width=width, max_length=length)
    assert found.tokens_IT.shape == (I, length)
    for tokens_T in found.tokens_IT:
        (end,) = np.flatnonzero(tokens_T == END)
        assert (tokens_T[end + 1 :] == PAD).all()
        assert not set(tokens_T[:end].tolist()) & {PAD, UNK, START}
        # A wider beam holds the empty caption, whose log-probability is no lower than the others'.
        if "END" in bias and width < V - 4:
            assert end == length - 1
    assert np.isfinite(found.log_prob_I).all()


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_captions_hold_known_ids_even_if_parameters_are_nan(method):
    found = small().run(params=jax.tree.map(lambda x: x * jnp.nan, small().params), method=method)
    assert 0 <= found.tokens_IT.min() <= found.tokens_IT.max() < V


@pytest.mark.parametrize("size", [16, 64, 304])
@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_the_best_words_by_blocks_equal_top_k(size, k):
    for x_BV in (jax.random.normal(jax.random.key(1), (50, size)), jnp.full((2, size), -jnp.inf)):
        # Many rounded numbers are equal: the first of them must be found.
        for x in (x_BV, jnp.round(2 * x_BV)):
            values, ids = beam_search._top_words(x, k, block=8)
            expected, index = jax.lax.top_k(x[:, FIRST_WORD:], k)
            np.testing.assert_array_equal(values, expected)
            np.testing.assert_array_equal(ids, index + FIRST_WORD)
