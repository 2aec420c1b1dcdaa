"""The recurrent decoder equals tests/reference.py, and logits depend on no later token and no other caption."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

from flaxcap.config import Config, Model
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer, recurrent
from flaxcap.text.vocabulary import START

F, V, P = 12, 30, 64
# Each value of each option occurs with both cells.
OPTIONS = [
    {"cell": cell, "attention_gate": gate, "initial_state": state, "positions": gate != (state == "mean")}
    | {"output": output, "tied": tied}
    for cell, gate, state, output, tied in (
        ("gru", False, "zeros", "state", False),
        ("gru", True, "mean", "state", False),
        ("lstm", True, "zeros", "state", False),
        ("lstm", False, "mean", "state", False),
        ("gru", False, "zeros", "state", True),
        ("lstm", True, "mean", "deep", False),
        ("gru", True, "zeros", "deep", True),
    )
]


def logits(decoder: decoder_lib.CaptionDecoder, states: jax.Array) -> jax.Array:
    return output_layer.logits(decoder.output_weights(), states)


def small(**options: Any) -> Config:
    sizes: dict[str, Any] = {"image_dim": 6, "embedding_dim": 5, "attention_dim": 7, "hidden_dim": 8, "head_dim": 9}
    if options.get("tied"):
        sizes["head_dim"] = sizes["embedding_dim"]
    return Config(model=Model(**sizes | options))


@pytest.fixture(params=OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def case(request):
    """Returns config, bind, parameters that are all different from zero, feats_IPF and tokens_ICT."""
    config = small(**request.param)
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(P, F, V))
    params = init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    feats_IPF = jax.random.normal(jax.random.key(2), (2, P, F))
    tokens_ICT = jax.random.randint(jax.random.key(3), (2, 3, 5), 4, V).at[..., 0].set(START)
    return config, bind, jax.tree.unflatten(tree, noisy), feats_IPF, tokens_ICT


def test_logits_equal_the_reference(case):
    config, bind, params, feats_IPF, tokens_ICT = case
    decoder = bind(params)
    logits_TICV = logits(decoder, decoder(feats_IPF, tokens_ICT)[0])
    for i, c in np.ndindex(2, 3):
        expected = reference.in_float64(
            functools.partial(reference.logits, config.model), params, feats_IPF[i], tokens_ICT[i, c]
        )
        np.testing.assert_allclose(logits_TICV[:, i, c], expected, atol=2e-5)


def test_teacher_forced_logits_equal_stepwise_logits(case):
    _, bind, params, feats_IPF, tokens_ICT = case
    decoder = bind(params)
    states_TICS, alpha_TICP = decoder(feats_IPF, tokens_ICT)
    logits_TICV = logits(decoder, states_TICS)
    time = tokens_ICT.shape[-1]
    memory, tables = decoder.remember(feats_IPF), decoder.tables()
    carry = decoder.start(memory, 3, time)
    for t in range(time):
        carry, states_IKS, alpha_IKP = decoder.step(tables, memory, carry, tokens_ICT[..., t], jnp.int32(t))
        np.testing.assert_allclose(states_IKS, states_TICS[t], atol=1e-6)
        np.testing.assert_allclose(alpha_IKP, alpha_TICP[t], atol=1e-6)
        np.testing.assert_allclose(logits(decoder, states_IKS), logits_TICV[t], atol=1e-5)


def test_logits_ignore_later_tokens_and_other_captions(case):
    """The logits at (image 0, caption 1, token t) have gradients for the embeddings of tokens 0 … t of that caption."""
    _, bind, params, feats_IPF, _ = case
    distinct_ICT = jnp.arange(30).reshape(2, 3, 5)

    def logits_at(params, t):
        decoder = bind(params)
        # A tied output layer would have gradients for all words.
        output = jax.lax.stop_gradient(decoder.output_weights())
        return output_layer.logits(output, decoder(feats_IPF, distinct_ICT)[0])[t, 0, 1].sum()

    gradient = jax.jit(jax.grad(logits_at))
    for t in range(5):
        grad_VE = gradient(params, t)["embedding"]["embedding"]
        assert set(np.flatnonzero(np.abs(grad_VE).sum(1))) == set(distinct_ICT[0, 1, : t + 1].tolist())


def test_the_state_carries_from_step_to_step(case):
    """TensorFlow's tutorial calls its GRU without the state. There, the same token always gives the same logits."""
    _, bind, params, feats_IPF, _ = case
    decoder = bind(params)
    same = jnp.full((2, 1, 4), 7)
    states_TICS, _ = decoder(feats_IPF, same)
    steps = np.abs(np.diff(np.asarray(states_TICS), axis=0)).max((1, 2, 3))
    assert (steps > 1e-3).all()
    changed = decoder(feats_IPF, same.at[..., 0].set(8))[0]
    assert np.abs(changed[-1] - states_TICS[-1]).max() > 1e-4


def test_attention_weights_sum_to_one_and_depend_on_the_image(case):
    _, bind, params, feats_IPF, tokens_ICT = case
    _, alpha_TICP = bind(params)(feats_IPF, tokens_ICT)
    np.testing.assert_allclose(alpha_TICP.sum(-1), 1, atol=1e-5)
    assert alpha_TICP.shape == (5, 2, 3, P)
    assert np.abs(alpha_TICP[:, 0] - alpha_TICP[:, 1]).max() > 1e-4


@pytest.mark.parametrize("output", ["state", "deep"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_output_has_the_embeddings_kernel_and_its_own_bias(output, tied):
    """S, the width of the states, is the number of inputs of the output layers."""
    config = small(output=output, tied=tied)
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(P, F, V))
    params = init(jax.random.key(0))
    sizes = config.model
    width = sizes.hidden_dim + (sizes.image_dim + sizes.embedding_dim if output == "deep" else 0)
    assert recurrent._states(sizes) == width == params["head"]["kernel"].shape[0]
    assert set(params["vocabulary"]) == ({"bias"} if tied else {"kernel", "bias"})
    assert params["vocabulary"]["bias"].shape == (V,)
    weights = bind(params).output_weights()
    assert weights.tanh == (output == "deep")
    assert weights.vocabulary["kernel"].shape == (sizes.head_dim, V)
    assert np.array_equal(weights.vocabulary["kernel"], params["embedding"]["embedding"].T) == tied


def test_a_deep_output_takes_the_state_the_context_and_the_word():
    """Show, Attend and Tell, equation 7: the three are concatenated."""
    config = small(output="deep")
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(P, F, V))
    decoder: Any = bind(init(jax.random.key(0)))
    feats_IPF = jax.random.normal(jax.random.key(2), (2, P, F))
    tokens_ICT = jax.random.randint(jax.random.key(3), (2, 3, 5), 4, V)
    states_TICS, alpha_TICP = decoder(feats_IPF, tokens_ICT)
    hidden, image = config.model.hidden_dim, config.model.image_dim
    context_TICD = jnp.einsum("ticp,ipd->ticd", alpha_TICP, decoder.remember(feats_IPF).values_IPD)
    np.testing.assert_allclose(states_TICS[..., hidden : hidden + image], context_TICD, atol=1e-5)
    words_ICTE = decoder.embedding(tokens_ICT)
    np.testing.assert_array_equal(states_TICS[..., hidden + image :], jnp.moveaxis(words_ICTE, 2, 0))


@pytest.mark.parametrize("options", [{}, {"output": "deep", "tied": True}])
def test_bf16_stays_near_f32_and_keeps_f32_parameters_and_logits(options):
    config = small(**options)
    _, init = decoder_lib.create(config, decoder_lib.Sizes(P, F, V))
    params = init(jax.random.key(0))
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="bfloat16"))
    feats_IPF = jax.random.normal(jax.random.key(2), (2, P, F))
    tokens_ICT = jax.random.randint(jax.random.key(3), (2, 3, 5), 4, V)
    found = []
    for c in (config, half):
        bind, init_c = decoder_lib.create(c, decoder_lib.Sizes(P, F, V))
        assert {x.dtype for x in jax.tree.leaves(init_c(jax.random.key(0)))} == {jnp.dtype("float32")}
        decoder = bind(params)
        states_TICS, _ = decoder(feats_IPF, tokens_ICT)
        assert states_TICS.dtype == c.train.dtype
        found.append(logits(decoder, states_TICS))
    assert found[1].dtype == jnp.float32
    np.testing.assert_allclose(found[0], found[1], atol=0.03)
    assert np.abs(found[0] - found[1]).max() > 0


def test_gradients_equal_finite_differences(case):
    """The gradients of attention and of the cell are written by hand."""
    _, bind, params, feats_IPF, tokens_ICT = case

    def loss(params):
        decoder = bind(params)
        return (logits(decoder, decoder(feats_IPF, tokens_ICT)[0]) ** 2).mean()

    check_grads(loss, (params,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
