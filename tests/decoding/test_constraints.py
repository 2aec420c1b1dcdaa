"""Constrained decoding against plain Python that applies the same rules to one caption and one token at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import (
    FEATS_IPF,
    MODELS,
    Ensemble,
    I,
    Small,
    T,
    V,
    allowed,
    caption,
    plain_beam_search,
    plain_greedy,
    small,
)

from flaxcap.config import ConfigError, Decode
from flaxcap.decoding import constraints, generate
from flaxcap.decoding.constraints import Constraints
from flaxcap.text import function_words
from flaxcap.text.vocabulary import END, PAD, SPECIAL, START, Vocabulary

# The decoder's most frequent words are function words: it repeats them and ends in them.
TALKATIVE = MODELS[1]
ENDINGS = {"the": 14, "of": 15, "a": 16}
VOCABULARY = Vocabulary([*SPECIAL, *({n: word for word, n in ENDINGS.items()}.get(n, f"word{n}") for n in range(4, V))])


# The rule of one step


@st.composite
def steps(draw):
    """Captions of some images at one step, and constraints."""
    length = draw(st.integers(1, 8))
    words = range(END + 1, END + 1 + draw(st.integers(1, 4)))
    rules = Constraints(
        max_length=length,
        min_length=draw(st.integers(0, length - 1)),
        no_repeat_ngram=draw(st.integers(0, 4)),
        endings=tuple(sorted(draw(st.sets(st.sampled_from(words))))),
    )
    t = draw(st.integers(0, length - 1))
    captions = draw(st.lists(st.lists(st.sampled_from(words), min_size=t, max_size=t), min_size=4, max_size=4))
    return rules, words, captions


@settings(max_examples=60)
@given(steps())
def test_a_step_forbids_what_the_plain_rules_forbid(drawn):
    rules, words, captions = drawn
    t, vocabulary = len(captions[0]), words[-1] + 1
    tokens_IKT = np.full((2, 2, rules.max_length), PAD, np.int32)
    tokens_IKT[..., :t] = np.reshape(captions, (2, 2, t))
    last_IK = tokens_IKT[..., t - 1] if t else np.full((2, 2), START, np.int32)
    logits_BV = np.random.default_rng(0).normal(size=(4, vocabulary)).astype(np.float32)
    given = jnp.asarray(logits_BV), jnp.asarray(tokens_IKT), jnp.asarray(last_IK), jnp.asarray(t)
    found_BV = np.asarray(rules.restrict(*given))
    for b, tokens in enumerate(captions):
        left = {int(w) for w in np.flatnonzero(found_BV[b] > -np.inf) if w >= END}
        if t == rules.max_length - 1:  # the methods themselves choose <end>
            left &= {END}
        assert left == allowed(tokens, rules, words)
        for word in left:
            assert found_BV[b, word] == logits_BV[b, word]


# Complete captions


RULES: dict[str, dict[str, Any]] = {
    "no word twice": {"no_repeat_ngram": 1},
    "no pair twice": {"no_repeat_ngram": 2},
    "six words": {"min_length": 6},
    "as long as possible": {"min_length": T - 1},
    "endings": {"bad_endings": "the of, A"},
    "all": {"no_repeat_ngram": 1, "min_length": 5, "bad_endings": "english"},
}


def rules_of(options: dict[str, Any]) -> Constraints:
    return constraints.of_preset(Decode(**{"max_length": T, **options}), VOCABULARY)


def run(of: Small | Ensemble, **options: Any):
    """Decodes with the words of `VOCABULARY`."""
    members = of.members if isinstance(of, Ensemble) else (of,)
    config = Decode(**{"max_length": T, **options})
    generator = generate.Generator([m.bind for m in members], config, VOCABULARY)
    return jax.device_get(generator(generator.freeze(*(m.params for m in members)), FEATS_IPF, jax.random.key(0)))


@pytest.mark.parametrize("name", RULES)
def test_greedy_decoding_follows_the_plain_rules(name):
    of, rules = small(**TALKATIVE), rules_of(RULES[name])
    found, free = run(of, **RULES[name]), run(of)
    assert (found.tokens_IT != free.tokens_IT).any()
    for i in range(I):
        tokens, log_prob = plain_greedy(of, i, rules)
        assert caption(found.tokens_IT[i]) == tokens
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_beam_search_follows_the_plain_rules(name, width):
    of, rules = small(**TALKATIVE), rules_of(RULES[name])
    options = {"method": "beam", "beam_width": width, "length_penalty": 0.6}
    found, free = run(of, **options, **RULES[name]), run(of, **options)
    assert (found.tokens_IT != free.tokens_IT).any()
    for i in range(I):
        tokens, log_prob = plain_beam_search(of, i, width, 0.6, rules)
        assert caption(found.tokens_IT[i]) == tokens
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)


@pytest.mark.parametrize("options", [{"top_k": 3, "temperature": 2.0}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_sampled_captions_obey_the_plain_rules(name, options):
    """Their log-probability is the model's, without constraints and temperature."""
    of, rules = small(**TALKATIVE), rules_of(RULES[name])
    found, free = (run(of, method="sample", **options, **some) for some in (RULES[name], {}))
    assert (found.tokens_IT != free.tokens_IT).any()
    for i in range(I):
        tokens = caption(found.tokens_IT[i])
        assert all(token in allowed(tokens[:k], rules) for k, token in enumerate(tokens))
        log_probs = of.follow(i, tokens[:-1])[0]
        np.testing.assert_allclose(found.log_prob_I[i], log_probs[range(len(tokens)), tokens].sum(), rtol=1e-4)


def test_sampling_from_the_most_probable_word_is_greedy_within_the_constraints():
    """Top_k counts the words that the constraints leave."""
    for options in RULES.values():
        found, greedy = run(small(**TALKATIVE), method="sample", top_k=1, **options), run(small(**TALKATIVE), **options)
        assert (found.tokens_IT == greedy.tokens_IT).all()


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_an_ensemble_follows_the_plain_rules_over_mean_probabilities(method):
    of = Ensemble(*(small(**options) for options in MODELS))
    rules = rules_of(RULES["all"])
    found = run(of, method=method, beam_width=3, **RULES["all"])
    for i in range(I):
        tokens, log_prob = plain_greedy(of, i, rules) if method == "greedy" else plain_beam_search(of, i, 3, 0.0, rules)
        assert caption(found.tokens_IT[i]) == tokens
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)


# Captions for which nothing is left


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"no_repeat_ngram": 1, "min_length": T - 1}, {3}),  # both words, <end>
        ({"bad_endings": "the of"}, {1, T - 1}),  # no last word is left: <end> follows a bad ending, one word earlier
        ({"no_repeat_ngram": 1, "min_length": 1, "bad_endings": "the of"}, {3}),
        ({"min_length": 0, "max_length": 1}, {1}),
        ({"min_length": 1, "max_length": 2, "bad_endings": "of"}, {2}),
    ],
    ids=str,
)
def test_a_caption_ends_when_the_constraints_leave_nothing(method, options, lengths):
    of, vocabulary = small_of_two_words(), Vocabulary([*SPECIAL, "the", "of"])
    options = {"max_length": T, "method": method, "beam_width": 3} | options
    generator = generate.Generator(of.bind, Decode(**options), vocabulary)
    found = jax.device_get(generator(generator.freeze(of.params), FEATS_IPF, jax.random.key(0)))
    for i, tokens_T in enumerate(found.tokens_IT):
        tokens = caption(tokens_T)
        assert (tokens_T[len(tokens) :] == PAD).all()
        log_probs = of.follow(i, tokens[:-1], max(T, len(tokens)))[0]
        np.testing.assert_allclose(found.log_prob_I[i], log_probs[range(len(tokens)), tokens].sum(), rtol=1e-4)
    assert {len(caption(t)) for t in found.tokens_IT} <= lengths


@functools.cache
def small_of_two_words() -> Small:
    return Small(6, end=0.0)


# Off


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_a_constraint_that_is_off_adds_nothing_to_the_program(method, monkeypatch):
    """The program without constraints is the one of a decoder that knows none."""

    def program(**options: Any) -> str:
        of = small()
        generator = generate.Generator(of.bind, Decode(max_length=T, method=method, **options), VOCABULARY)
        return str(jax.make_jaxpr(generator._generate)(generator.freeze(of.params), FEATS_IPF, jax.random.key(0)))

    constrained, off = program(min_length=2), program()
    monkeypatch.setattr(Constraints, "restrict", lambda self, logits_BV, *_: logits_BV)
    assert program() == off != constrained


# The words of a preset


def test_bad_endings_are_the_words_of_the_vocabulary():
    assert rules_of({"bad_endings": "the of, A"}).endings == (14, 15, 16)
    assert rules_of({"bad_endings": "english"}).endings == (14, 15, 16)
    assert rules_of({"bad_endings": "of, unheard"}).endings == (15,)
    assert rules_of({}).endings == ()
    assert {"a", "the", "of", "with", "before", "upon", "am"} <= function_words.ENGLISH


def test_bad_endings_that_the_model_cannot_write_are_refused():
    with pytest.raises(
        ConfigError, match=r"bad_endings=der die: found none of these words in the vocabulary, expected"
    ):
        rules_of({"bad_endings": "der die"})
