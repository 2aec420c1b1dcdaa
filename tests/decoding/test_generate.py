"""Greedy decoding and sampling follow the decoder's probabilities, image by image."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.config import Config, Decode, Model
from flaxcap.decoding import generate, sampling
from flaxcap.decoding.step import Decoded
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import END, PAD, START, UNK

F, V, I, T = 12, 20, 6, 9
WIDTHS: dict[str, Any] = {"image_dim": 6, "embedding_dim": 5, "attention_dim": 7, "hidden_dim": 8, "head_dim": 9}
BIND, INIT = decoder_lib.create(Config(model=Model(**WIDTHS)), decoder_lib.Sizes(64, F, V))
FEATS_IPF = jax.random.normal(jax.random.key(9), (I, 64, F))


def far(init: Any, seed: int = 37, end: float = 1.0) -> decoder_lib.Params:
    """Returns large random parameters: captions differ, and have different lengths."""
    leaves, tree = jax.tree.flatten(init(jax.random.key(3)))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.8 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    found = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    return found | {"vocabulary": found["vocabulary"] | {"bias": found["vocabulary"]["bias"].at[END].add(end)}}


@pytest.fixture(scope="module")
def params():
    return far(INIT)


@functools.cache
def make(bind: Any = BIND, **options: Any) -> generate.Generator:
    return generate.Generator(bind, Decode(**{"max_length": T, **options}))


def run(params, key: int = 0, feats_IPF=FEATS_IPF, bind: Any = BIND, **options: Any) -> Decoded:
    """Generates captions. For an ensemble `params` and `bind` are tuples."""
    generator = make(bind, **options)
    frozen = generator.freeze(*params) if isinstance(params, tuple) else generator.freeze(params)
    return jax.device_get(generator(frozen, feats_IPF, jax.random.key(key)))


def teacher_forced(bind: Any, params: Any, feats_PF: Any, given: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits `[T, V]` and the attention weights `[T, P]` after each given token of one caption."""
    decoder = bind(params)
    states_TICS, alpha_TICP = decoder(feats_PF[None], jnp.array([[given]]))
    logits_TICV = output_layer.logits(decoder.output_weights(), states_TICS)
    return np.array(logits_TICV[:, 0, 0]), np.array(alpha_TICP[:, 0, 0])


@pytest.mark.parametrize(
    ("options", "seed"), [({}, 37), ({"output": "deep", "cell": "lstm"}, 23), ({"tied": True, "head_dim": 5}, 22)]
)
def test_greedy_takes_the_most_probable_allowed_word_at_every_step(options, seed):
    bind, init = decoder_lib.create(Config(model=Model(**WIDTHS | options)), decoder_lib.Sizes(64, F, V))
    params = far(init, seed)
    found = run(params, bind=bind)
    assert len({t.tolist().index(END) for t in found.tokens_IT}) > 2  # the captions have different lengths
    for i in range(I):
        tokens = found.tokens_IT[i][: int(np.argmax(found.tokens_IT[i] == END)) + 1]
        logits_TV, alpha_TP = teacher_forced(bind, params, FEATS_IPF[i], [START, *tokens[:-1]])
        log_probs_TV = np.array(jax.nn.log_softmax(logits_TV))
        np.testing.assert_allclose(found.log_prob_I[i], log_probs_TV[np.arange(len(tokens)), tokens].sum(), rtol=1e-4)
        np.testing.assert_allclose(found.alpha_ITP[i, : len(tokens)], alpha_TP, atol=1e-5)
        log_probs_TV[:, [PAD, UNK, START]] = -np.inf
        free = slice(0, min(len(tokens), T - 1))  # token T - 1 is always <end>
        assert tokens[free].tolist() == log_probs_TV.argmax(-1)[free].tolist()


SAMPLED = {"method": "sample"}


@pytest.mark.parametrize("options", [{}, SAMPLED, SAMPLED | {"top_k": 3, "temperature": 0.5}, SAMPLED | {"top_p": 0.7}])
def test_captions_hold_words_then_one_end_then_padding(params, options):
    for tokens_T in run(params, **options).tokens_IT:
        (end,) = np.flatnonzero(tokens_T == END)
        assert (tokens_T[end + 1 :] == PAD).all()
        assert not set(tokens_T[:end].tolist()) & {PAD, UNK, START}


def test_every_caption_ends_even_if_the_decoder_never_prefers_end(params):
    bias_V = params["vocabulary"]["bias"].at[END].set(-1e4)
    never = params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}}
    assert (run(never).tokens_IT[:, -1] == END).all()


def test_unknown_start_and_padding_are_never_chosen(params):
    bias_V = params["vocabulary"]["bias"].at[jnp.array([PAD, UNK, START])].set(1e4)
    tokens_IT = run(params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}}).tokens_IT
    assert not np.isin(tokens_IT, [UNK, START]).any()
    assert (tokens_IT[:, 0] != PAD).all()


@pytest.mark.parametrize("options", [{}, {"method": "sample", "top_k": 5}])
def test_an_images_caption_does_not_depend_on_the_batch(params, options):
    together = run(params, **options)
    for i in range(I):
        # Image i draws from fold_in(key, i). So the image must have index i here too.
        alone = run(params, feats_IPF=jnp.repeat(FEATS_IPF[i : i + 1], i + 1, 0), **options)
        assert alone.tokens_IT[-1].tolist() == together.tokens_IT[i].tolist()
        np.testing.assert_allclose(alone.log_prob_I[-1], together.log_prob_I[i], rtol=1e-4)


def test_sampling_follows_its_seed_and_the_decoders_probabilities(params):
    options = {"method": "sample", "temperature": 1.0}
    many = jnp.repeat(FEATS_IPF[:1], 2000, 0)
    found = run(params, key=1, feats_IPF=many, **options)
    assert (found.tokens_IT == run(params, key=1, feats_IPF=many, **options).tokens_IT).all()
    assert (found.tokens_IT != run(params, key=2, feats_IPF=many, **options).tokens_IT).any()
    expected_V = np.array(jax.nn.softmax(teacher_forced(BIND, params, FEATS_IPF[0], [START])[0][0]))
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


# The nucleus


def nucleus(logits_V: Any, top_p: float) -> set[int]:
    """Adds the most probable words one by one, until their probabilities reach top_p."""
    p_V = np.exp(logits_V - np.max(logits_V))
    p_V /= p_V.sum()
    found, reached = set(), 0.0
    for word in np.argsort(-p_V, kind="stable").tolist():
        if reached >= top_p:
            break
        found.add(word)
        reached += p_V[word]
    return found


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_the_nucleus_holds_the_fewest_words_that_reach_top_p(top_p):
    logits_BV = np.array(3 * jax.random.normal(jax.random.key(0), (40, V)))
    logits_BV[:, :END] = -np.inf
    logits_BV[0, END:] = 1.0  # equally probable words: all are kept
    kept_BV = np.asarray(sampling._nucleus(jnp.asarray(logits_BV), top_p))
    for b in range(1, 40):
        left = set(np.flatnonzero(kept_BV[b] > -np.inf).tolist())
        assert left == nucleus(logits_BV[b].astype(np.float64), top_p)
        np.testing.assert_array_equal(kept_BV[b][list(left)], logits_BV[b][list(left)])
    assert (kept_BV[0] > -np.inf).sum() == V - END


def test_a_nucleus_of_one_word_equals_greedy_decoding(params):
    assert (run(params, method="sample", top_p=1e-6).tokens_IT == run(params).tokens_IT).all()


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_sampled_words_lie_in_the_nucleus_and_follow_its_probabilities(params, temperature):
    """Logits are divided by the temperature first. The nucleus holds no token that decoding never chooses."""
    many = jnp.repeat(FEATS_IPF[:1], 2000, 0)
    found = run(params, feats_IPF=many, method="sample", top_p=0.8, temperature=temperature)
    logits_V = teacher_forced(BIND, params, FEATS_IPF[0], [START])[0][0] / temperature
    logits_V[[PAD, UNK, START]] = -np.inf
    inside = sorted(nucleus(logits_V, 0.8))
    assert 1 < len(inside) < V - END
    drawn_V = np.bincount(found.tokens_IT[:, 0], minlength=V) / 2000
    assert np.flatnonzero(drawn_V).tolist() == inside
    expected = np.exp(logits_V[inside]) / np.exp(logits_V[inside]).sum()
    np.testing.assert_allclose(drawn_V[inside], expected, atol=0.05)


# Ensembles

OTHER_BIND, OTHER_INIT = decoder_lib.create(
    Config(model=Model(**WIDTHS | {"hidden_dim": 5, "cell": "lstm", "output": "deep"})), decoder_lib.Sizes(64, F, V)
)


@pytest.mark.parametrize("options", [{}, SAMPLED, {"method": "beam", "beam_width": 3}])
def test_an_ensemble_of_equal_members_equals_its_member(params, options):
    found, alone = run((params, params), bind=(BIND, BIND), **options), run(params, **options)
    assert (found.tokens_IT == alone.tokens_IT).all()
    np.testing.assert_allclose(found.log_prob_I, alone.log_prob_I, rtol=1e-5)
    np.testing.assert_allclose(found.alpha_ITP, alone.alpha_ITP, atol=1e-6)


def test_an_ensembles_probabilities_and_attention_are_the_means_of_its_members(params):
    """The two members share nothing but the features and the vocabulary."""
    binds = (BIND, OTHER_BIND)
    trees = (params, far(OTHER_INIT, seed=5, end=0.0))
    found = run(trees, bind=binds)
    apart = [run(tree, bind=bind).tokens_IT for bind, tree in zip(binds, trees, strict=True)]
    assert len({tokens.tobytes() for tokens in (found.tokens_IT, *apart)}) == 3
    for i in range(I):
        tokens = found.tokens_IT[i][: int(np.argmax(found.tokens_IT[i] == END)) + 1]
        p, alphas = [], []
        for bind, tree in zip(binds, trees, strict=True):
            logits_TV, alpha_TP = teacher_forced(bind, tree, FEATS_IPF[i], [START, *tokens[:-1]])
            p.append(np.asarray(jax.nn.softmax(logits_TV)))
            alphas.append(alpha_TP)
        mean_TV = np.mean(p, 0)
        log_prob = np.log(mean_TV[np.arange(len(tokens)), tokens]).sum()
        np.testing.assert_allclose(found.log_prob_I[i], log_prob, rtol=1e-4)
        np.testing.assert_allclose(found.alpha_ITP[i, : len(tokens)], np.mean(alphas, 0), atol=1e-5)
        mean_TV[:, [PAD, UNK, START]] = 0
        free = slice(0, min(len(tokens), T - 1))
        assert tokens[free].tolist() == mean_TV.argmax(-1)[free].tolist()


# Several captions of an image


def sampled(params: Any, feats_IPF: Any, keys_I: Any, captions: int, **options: Any) -> np.ndarray:
    """Returns `tokens_ICT`."""
    config = Decode(**{"max_length": T, **SAMPLED, **options})
    return np.asarray(
        jax.jit(lambda *given: generate.sample(BIND, given[0], given[1], config, given[2], captions))(
            params, feats_IPF, keys_I
        )
    )


def test_an_images_sampled_captions_differ_and_are_complete(params):
    keys_I = jax.random.split(jax.random.key(0), I)
    found = sampled(params, FEATS_IPF, keys_I, 5)
    assert found.shape == (I, 5, T)
    for tokens_CT in found:
        assert len(np.unique(tokens_CT, axis=0)) > 3
        for tokens_T in tokens_CT:
            (end,) = np.flatnonzero(tokens_T == END)
            assert (tokens_T[end + 1 :] == PAD).all()
            assert not set(tokens_T[:end].tolist()) & {PAD, UNK, START}
    again, other = (sampled(params, FEATS_IPF, jax.random.split(jax.random.key(n), I), 5) for n in (0, 1))
    assert (found == again).all()
    assert (found != other).any(-1).mean() > 0.8


def test_sampled_captions_depend_on_the_image_and_its_key_alone(params):
    keys_I = jax.random.split(jax.random.key(0), 8)
    feats_IPF = jnp.concatenate([FEATS_IPF, FEATS_IPF[:2]])
    together = sampled(params, feats_IPF, keys_I, 3)
    alone = [sampled(params, feats_IPF[i : i + 1], keys_I[i : i + 1], 3)[0] for i in range(8)]
    assert (together == alone).all()
    assert (together[:2] != together[6:]).any()  # the same images with other keys
    mesh = sharding.make_mesh()
    feats_IPF, keys_I = jax.device_put((feats_IPF, keys_I), sharding.over_images(mesh))
    assert (sampled(jax.device_put(params, sharding.replicated(mesh)), feats_IPF, keys_I, 3) == together).all()


def test_sampled_captions_follow_the_decoders_probabilities(params):
    """Counts the first words of 10 captions of each of 200 equal images."""
    found = sampled(params, jnp.repeat(FEATS_IPF[:1], 200, 0), jax.random.split(jax.random.key(0), 200), 10)
    expected_V = np.array(jax.nn.softmax(teacher_forced(BIND, params, FEATS_IPF[0], [START])[0][0]))
    expected_V[[PAD, UNK, START]] = 0
    drawn_V = np.bincount(found[..., 0].ravel(), minlength=V) / 2000
    np.testing.assert_allclose(drawn_V, expected_V / expected_V.sum(), atol=0.05)
