"""Decoding goes through the same step as training; a batch is its images one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap import decode, model
from flaxcap.config import Config, Decode, Model
from flaxcap.text import END, PAD, START, UNK

F, V, I, T = 12, 20, 6, 9
CONFIG = Config(model=Model(image_dim=6, embedding_dim=5, attention_dim=7, hidden_dim=8, head_dim=9))
BIND, INIT = model.create(CONFIG, F, V)
FEATS_IPF = jax.random.normal(jax.random.key(9), (I, 64, F))


@pytest.fixture(scope="module")
def params():
    """A decoder far enough from its start that its captions differ and end at various lengths."""
    leaves, tree = jax.tree.flatten(INIT(jax.random.key(3)))
    keys = jax.random.split(jax.random.key(37), len(leaves))
    noise = [0.8 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    found = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    return found | {"vocabulary": found["vocabulary"] | {"bias": found["vocabulary"]["bias"].at[END].add(1.0)}}


@functools.cache
def made(**options: Any):
    return decode.make_decode(BIND, Decode(**{"max_length": T, **options}))


def run(params, key: int = 0, feats_IPF=FEATS_IPF, **options: Any) -> decode.Decoded:
    return jax.device_get(made(**options)(params, feats_IPF, jax.random.key(key)))


def test_greedy_takes_the_most_probable_allowed_word_at_every_step(params):
    found = run(params)
    assert len({t.tolist().index(END) for t in found.tokens_IT}) > 2  # or the test would show little
    captioner = BIND(params)
    for i in range(I):
        tokens = found.tokens_IT[i][: int(np.argmax(found.tokens_IT[i] == END)) + 1]
        given = jnp.array([[[START, *tokens[:-1]]]])
        hidden, alpha = captioner(FEATS_IPF[i : i + 1], given)
        log_probs_TV = np.array(jax.nn.log_softmax(captioner.logits(hidden)[0, 0]))
        np.testing.assert_allclose(found.log_prob_I[i], log_probs_TV[np.arange(len(tokens)), tokens].sum(), rtol=1e-4)
        np.testing.assert_allclose(found.alpha_ITP[i, : len(tokens)], alpha[0, 0], atol=1e-5)
        log_probs_TV[:, [PAD, UNK, START]] = -np.inf
        free = slice(0, min(len(tokens), T - 1))  # the last place is <end> in any case
        assert tokens[free].tolist() == log_probs_TV.argmax(-1)[free].tolist()


@pytest.mark.parametrize("options", [{}, {"method": "sample"}, {"method": "sample", "top_k": 3, "temperature": 0.5}])
def test_captions_hold_words_then_one_end_then_padding(params, options):
    for tokens_T in run(params, **options).tokens_IT:
        (end,) = np.flatnonzero(tokens_T == END)
        assert (tokens_T[end + 1 :] == PAD).all()
        assert not set(tokens_T[:end].tolist()) & {PAD, UNK, START}


def test_every_caption_ends_even_where_the_model_would_not(params):
    bias_V = params["vocabulary"]["bias"].at[END].set(-1e4)
    never = params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}}
    assert (run(never).tokens_IT[:, -1] == END).all()


def test_a_model_that_prefers_unknown_and_padding_says_neither(params):
    bias_V = params["vocabulary"]["bias"].at[jnp.array([PAD, UNK, START])].set(1e4)
    tokens_IT = run(params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}}).tokens_IT
    assert not np.isin(tokens_IT, [UNK, START]).any()
    assert (tokens_IT[:, 0] != PAD).all()


@pytest.mark.parametrize("options", [{}, {"method": "sample", "top_k": 5}])
def test_a_batch_is_its_images_one_by_one(params, options):
    together = run(params, **options)
    for i in range(I):
        # Image i draws from fold_in(key, i): alone in place i it is the same.
        alone = run(params, feats_IPF=jnp.repeat(FEATS_IPF[i : i + 1], i + 1, 0), **options)
        assert alone.tokens_IT[-1].tolist() == together.tokens_IT[i].tolist()
        np.testing.assert_allclose(alone.log_prob_I[-1], together.log_prob_I[i], rtol=1e-4)


def test_sampling_follows_its_seed_and_the_model(params):
    options = {"method": "sample", "temperature": 1.0}
    many = jnp.repeat(FEATS_IPF[:1], 2000, 0)
    found = run(params, key=1, feats_IPF=many, **options)
    assert (found.tokens_IT == run(params, key=1, feats_IPF=many, **options).tokens_IT).all()
    assert (found.tokens_IT != run(params, key=2, feats_IPF=many, **options).tokens_IT).any()
    captioner = BIND(params)
    hidden, _ = captioner(FEATS_IPF[:1], jnp.array([[[START]]]))
    expected_V = np.array(jax.nn.softmax(captioner.logits(hidden)[0, 0, 0]))
    expected_V[[PAD, UNK, START]] = 0
    drawn_V = np.bincount(found.tokens_IT[:, 0], minlength=V) / 2000
    np.testing.assert_allclose(drawn_V, expected_V / expected_V.sum(), atol=0.05)


def test_top_k_and_temperature(params):
    greedy = run(params).tokens_IT
    assert (run(params, method="sample", top_k=1).tokens_IT == greedy).all()
    assert (run(params, method="sample", temperature=1e-4).tokens_IT == greedy).all()
    many = jnp.repeat(FEATS_IPF[:1], 500, 0)
    for k in (2, 4):
        assert len(set(run(params, feats_IPF=many, method="sample", top_k=k).tokens_IT[:, 0])) <= k
    hot = run(params, feats_IPF=many, method="sample", temperature=10.0)
    cold = run(params, feats_IPF=many, method="sample", temperature=0.5)
    assert hot.log_prob_I.mean() < cold.log_prob_I.mean()
