"""The trainer's loss and gradients equal those of the plain model in tests/reference.py."""

from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st

from flaxcap.config import Config, Model, Train
from flaxcap.models import decoder as decoder_lib
from flaxcap.text.vocabulary import END, PAD, START
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch, StepContext


class Case(NamedTuple):
    """The sizes and options of a model and a batch."""

    seed: int
    cell: str
    gate: bool
    initial_state: str
    positions: bool
    widths: tuple[int, int, int, int, int]  # of image, embedding, attention, hidden, head
    features: int
    vocabulary: int
    images: int
    captions: int
    longest: int  # most tokens of a caption, <start> and <end> included
    lengths: str  # "any": also absent captions; "shortest": <start> <end> only; "same": `longest`
    grid: int  # positions of an image; 64 if positions have an embedding
    scale: float  # of keys and queries
    output: str = "state"
    tied: bool = False  # head is as wide as embedding
    smoothing: float = 0.0
    doubly_stochastic: float = 0.0


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    cell=st.sampled_from(["gru", "lstm"]),
    gate=st.booleans(),
    initial_state=st.sampled_from(["zeros", "mean"]),
    positions=st.booleans(),
    widths=st.tuples(*[st.integers(1, 12)] * 5),
    features=st.integers(1, 12),
    vocabulary=st.integers(5, 40),
    images=st.integers(1, 3),
    captions=st.integers(1, 3),
    longest=st.integers(2, 6),
    lengths=st.sampled_from(["any", "shortest", "same"]),
    grid=st.integers(1, 12),
    scale=st.sampled_from([1.0, 4.0]),
    output=st.sampled_from(["state", "deep"]),
    tied=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 0.6]),
    doubly_stochastic=st.sampled_from([0.0, 0.7]),
)
# Keys and queries of up to about 20: tanh is 1 in float32 from 9 on.
SATURATED = Case(3, "lstm", True, "mean", False, (8, 5, 7, 8, 9), 6, 30, 2, 3, 6, "any", 9, 7.0)
SHORTEST = Case(2, "gru", True, "mean", True, (5, 3, 6, 7, 5), 4, 9, 3, 2, 2, "shortest", 64, 1.0)
# 6 captions of one token each, among 234 tokens; they are packed to 128.
PADDED = Case(4, "gru", False, "zeros", False, (5, 3, 6, 7, 5), 4, 9, 2, 3, 40, "shortest", 5, 4.0)
# Show, Attend and Tell; the output layer shares the weights of the embedding.
DEEP = Case(5, "lstm", True, "mean", False, (5, 6, 7, 8, 6), 4, 20, 2, 3, 6, "any", 9, 1.0, "deep", True, 0.1, 0.7)
TIED = Case(6, "gru", False, "zeros", False, (5, 6, 7, 8, 6), 4, 20, 2, 3, 6, "any", 9, 1.0, "state", True, 0.0, 0.7)


def config_of(case: Case, **train: Any) -> Config:
    names = ("image_dim", "embedding_dim", "attention_dim", "hidden_dim", "head_dim")
    sizes: dict[str, Any] = dict(zip(names, case.widths, strict=True))
    sizes["head_dim"] = sizes["embedding_dim"] if case.tied else sizes["head_dim"]
    options = {"attention_gate": case.gate, "initial_state": case.initial_state, "positions": case.positions}
    options |= {"output": case.output, "tied": case.tied}
    terms: dict[str, Any] = {"label_smoothing": case.smoothing, "doubly_stochastic": case.doubly_stochastic}
    return Config(model=Model(cell=case.cell, **sizes, **options), train=Train(**terms | train))


def sizes_of(case: Case) -> decoder_lib.Sizes:
    return decoder_lib.Sizes(64 if case.positions else case.grid, case.features, case.vocabulary)


def batch(case: Case) -> tuple[Any, Any]:
    """Returns `feats_IPF` and `tokens_ICT`."""
    rng = np.random.default_rng(case.seed)
    tokens_ICT = np.full((case.images, case.captions, case.longest), PAD, np.int32)
    for i, c in np.ndindex(case.images, case.captions):
        length = {"any": rng.integers(2, case.longest + 1), "shortest": 2, "same": case.longest}[case.lengths]
        if case.lengths != "any" or rng.random() < 0.7 or (i, c) == (0, 0):
            tokens_ICT[i, c, :length] = [START, *rng.integers(4, case.vocabulary, length - 2), END]
    positions = sizes_of(case).positions
    return rng.standard_normal((case.images, positions, case.features)).astype(np.float32), tokens_ICT


def parameters(init: Any, case: Case) -> Any:
    """Returns parameters and biases of one magnitude; those of keys and queries are scaled."""
    rng = np.random.default_rng(case.seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    attention_dim = case.widths[2]
    for layer in (params["key"], params["cell"]["recurrent"]):
        for leaf in layer.values():
            leaf[..., :attention_dim] *= case.scale
    return params


def mean_loss(bind: Any, config: Config, params: Any, feats_IPF: Any, tokens_ICT: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the trainer's objective and logged cross-entropy, per token."""
    microbatch = Microbatch(feats_IPF, tokens_ICT, jnp.ones(tokens_ICT.shape[:2]), jnp.arange(len(tokens_ICT)))
    context = StepContext(jax.random.key(0), jnp.ones(()), jnp.zeros(()))
    total, (sums, _) = objective.objective(bind(params), microbatch, context, config.train)
    return total / sums.tokens, sums.nats / sums.tokens


def fast(config: Config, case: Case, params: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    bind, _ = decoder_lib.create(config, sizes_of(case))

    def run(params: Any, feats_IPF: Any, tokens_ICT: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        return jax.value_and_grad(mean_loss, 2, has_aux=True)(bind, config, params, feats_IPF, tokens_ICT)

    return jax.jit(run)(params, *batch(case))


@hypothesis.given(case=CASES)
@hypothesis.example(case=SATURATED)
@hypothesis.example(case=SHORTEST)
@hypothesis.example(case=PADDED)
@hypothesis.example(case=DEEP)
@hypothesis.example(case=TIED)
@hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
def test_loss_and_every_gradient_equal_those_of_the_plain_model(case):
    """The plain model runs in float64. Tolerances are 1e-5 of the loss, and of the largest gradient of a layer.

    The tolerance is that of a layer, not of an array: the gradient of the gate's only bias is a sum that may be near 0.
    """
    config = config_of(case)
    _, init = decoder_lib.create(config, sizes_of(case))
    params = parameters(init, case)
    losses, grads = fast(config, case, params)

    feats_IPF, tokens_ICT = batch(case)
    plain = jax.value_and_grad(
        lambda params, feats_IPF: reference.batch_loss(config, params, feats_IPF, tokens_ICT), has_aux=True
    )
    expected_losses, expected = reference.in_float64(plain, params, feats_IPF)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    ours, layers = layers_of(grads), layers_of(expected)
    assert ours.keys() == layers.keys()
    for name, layer in layers.items():
        largest = max(np.abs(leaf).max() for leaf in layer.values())
        for kind in layer:
            atol = 1e-5 * largest + 1e-9
            np.testing.assert_allclose(ours[name][kind], layer[kind], 0, atol, err_msg=f"{name}.{kind}")
            assert ours[name][kind].dtype == jnp.float32


def layers_of(params: Any) -> dict[str, dict[str, Any]]:
    """Returns {"cell.gate": {"kernel": ..., "bias": ...}, ...}."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *names, kind = [key.key for key in path]
        layer, kind = (".".join(names), kind) if names else (kind, "")
        found.setdefault(layer, {})[kind] = leaf
    return found


def test_the_saturated_case_has_saturated_and_other_energies():
    """tanh is 1 in float32 for some energies, and not for others: the case tests both."""
    config = config_of(SATURATED)
    bind, init = decoder_lib.create(config, sizes_of(SATURATED))
    decoder: Any = bind(parameters(init, SATURATED))
    feats_IPF, tokens_ICT = batch(SATURATED)
    keys_IPA = jnp.log(decoder.remember(feats_IPF).exp_keys_IPA) / 2
    hidden_TICH, _ = decoder(feats_IPF, tokens_ICT)
    query_TICA = decoder.cell.recurrent(hidden_TICH)[..., : config.model.attention_dim]
    energies = np.abs(keys_IPA[None, :, None] + query_TICA[..., None, :])
    assert (energies > 9).mean() > 0.2
    assert (energies < 3).mean() > 0.1
    assert np.abs(keys_IPA).max() < 40


@pytest.mark.parametrize("rounded", ["dtype", "matmul_dtype"])
@pytest.mark.parametrize(("cell", "output"), [("gru", "state"), ("lstm", "state"), ("gru", "deep")])
def test_bfloat16_gradients_have_the_direction_of_float32_gradients(cell, output, rounded):
    """The model is 64 wide, with 200 words, 64 positions, and 5 x 4 captions of up to 9 tokens.

    Of the complete gradient as one vector, the cosine is above 0.999 and the norm within 1%. The loss is within 0.2%.
    Parameters, gradients and loss stay float32.
    """
    case = Case(0, cell, True, "mean", True, (64, 48, 64, 64, 64), 96, 200, 5, 4, 9, "any", 64, 1.0, output)
    config = config_of(case)
    _, init = decoder_lib.create(config, sizes_of(case))
    # Small weights, as wide layers have them: nothing saturates.
    params = jax.tree.map(lambda x: 2 * x / np.sqrt(x.shape[0]), parameters(init, case))
    found = []
    for precision in ({}, {rounded: "bfloat16"}):
        (loss, _), grads = fast(config_of(case, **precision), case, params)
        assert loss.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        found.append((loss, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])))
    (loss, exact), (half_loss, half) = found
    norms = np.linalg.norm(exact), np.linalg.norm(half)
    cosine, ratio = exact @ half / np.prod(norms), norms[1] / norms[0]
    np.testing.assert_allclose(half_loss, loss, rtol=2e-3)
    assert cosine > 0.999
    assert abs(ratio - 1) < 0.01
    assert np.abs(exact - half).max() > 0  # the precision differed
