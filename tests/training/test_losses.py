"""The packed loss and its gradients equal those of log_softmax over the real tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.models import output_layer
from flaxcap.text.vocabulary import PAD
from flaxcap.training import losses as losses_lib

S, V = 5, 11
HEAD_DIM = 6
TOKENS = 400


def make(tokens: int, real: int, seed: int = 0, tanh: bool = False) -> tuple[output_layer.Weights, Any, Any]:
    """Returns weights, states_MS and targets_M; `real` targets are not <pad>, in random order."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    head = {"kernel": normal(S, HEAD_DIM), "bias": normal(HEAD_DIM)}
    weights = output_layer.Weights(head, {"kernel": normal(HEAD_DIM, V), "bias": normal(V)}, tanh)
    targets_M = rng.integers(PAD + 1, V, tokens)
    targets_M[rng.permutation(tokens)[real:]] = PAD
    return weights, normal(tokens, S), jnp.asarray(targets_M, jnp.int32)


def plain(
    weights: Any, states_MS: Any, targets_M: Any, weight_M: Any = None, smoothing: float = 0.0
) -> losses_lib.Losses:
    """Returns the losses by log_softmax of all tokens, without packing."""
    head, vocabulary = weights.head, weights.vocabulary
    head_out = states_MS @ head["kernel"] + head["bias"][None]
    head_out = jnp.tanh(head_out) if weights.tanh else head_out
    log_p_MV = jax.nn.log_softmax(head_out @ vocabulary["kernel"] + vocabulary["bias"][None])
    real_M = targets_M != PAD
    nats_M = -jnp.where(real_M, log_p_MV[jnp.arange(len(targets_M)), targets_M], 0)
    right = (log_p_MV.argmax(-1) == targets_M) & real_M
    # Szegedy et al. 2015: the target distribution is mixed with the uniform one.
    target_MV = (1 - smoothing) * jax.nn.one_hot(targets_M, V) + smoothing / V
    smooth_M = -jnp.where(real_M, (target_MV * log_p_MV).sum(-1), 0)
    weight_M = jnp.ones(len(targets_M)) if weight_M is None else weight_M
    sums = losses_lib.Sums(nats_M.sum(), *(x.sum(dtype=jnp.float32) for x in (real_M, right)))
    return losses_lib.Losses((weight_M * smooth_M).sum(), sums, nats_M)


def fast(
    weights: Any, states_MS: Any, targets_M: Any, weight_M: Any = None, smoothing: float = 0.0
) -> losses_lib.Losses:
    weight_M = jnp.ones(len(targets_M)) if weight_M is None else weight_M
    return losses_lib.token_losses(weights, states_MS, targets_M, weight_M, smoothing)


def gradients(function: Any, weights: Any, states_MS: Any, targets_M: Any, *more: Any) -> tuple[Any, losses_lib.Losses]:
    def objective(weights: Any, states_MS: Any) -> tuple[jax.Array, losses_lib.Losses]:
        losses = function(weights, states_MS, targets_M, *more)
        return losses.objective, losses

    return jax.grad(objective, (0, 1), has_aux=True)(weights, states_MS)


fast_gradients = jax.jit(lambda *arguments: gradients(fast, *arguments))


def assert_same(ours: losses_lib.Losses, expected: losses_lib.Losses, tolerance: float = 5e-6) -> None:
    np.testing.assert_allclose(ours.sums, expected.sums, rtol=tolerance)
    np.testing.assert_allclose(ours.objective, expected.objective, rtol=tolerance)
    assert_near(ours.nats_M, expected.nats_M, tolerance)


def assert_near(ours: Any, expected: Any, tolerance: float = 5e-6) -> None:
    """Asserts that every leaf differs by less than `tolerance` times its largest value."""

    def compare(a: jax.Array, b: jax.Array) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, 0, tolerance * max(np.abs(b).max(), 1e-6))

    jax.tree.map(compare, ours, expected)


@pytest.mark.parametrize("tokens", [1, 2, 65, 130, TOKENS])
def test_sums_and_gradients_equal_those_of_log_softmax(tokens):
    """With 0, 1 and all real tokens, and around each size that tokens are packed to."""
    slow, alone = jax.jit(functools.partial(gradients, plain)), jax.jit(fast)
    counts = {0, 1, *(size + more for size in losses_lib.sizes(tokens) for more in (-1, 0, 1))}
    for real in sorted(counts - {tokens + 1}):
        arguments = make(tokens, real, seed=real)
        (grads, losses), (expected_grads, expected) = fast_gradients(*arguments), slow(*arguments)
        assert_same(losses, expected)
        assert_same(alone(*arguments), expected)
        assert_near(grads, expected_grads)
        assert losses.sums.tokens == real
        assert (np.asarray(grads[1])[np.asarray(arguments[2]) == PAD] == 0).all()


def packed_sizes() -> list[int]:
    """Returns the packed size for each number of real tokens."""
    weights, states_MS, _ = make(TOKENS, 0)

    def losses(_w: Any, hidden: Any, targets: Any, _weight: Any) -> tuple:
        return losses_lib.Losses(jnp.float32(len(hidden)), losses_lib.no_tokens(), targets * 0.0), None, None

    @jax.jit
    def size(targets_M: jax.Array) -> Any:
        return losses_lib._packed(losses, weights, states_MS, targets_M, jnp.ones(TOKENS))[0].objective

    return [int(size(make(TOKENS, real)[2])) for real in range(TOKENS + 1)]


def rows_of_logits() -> tuple[int, list[int]]:
    """Returns the most rows of an array of vocabulary width: outside of the packed branches, and in each of them."""
    found = jax.make_jaxpr(fast_gradients)(*make(TOKENS, TOKENS)).jaxpr
    switches: list = []

    def most(jaxpr: Any) -> int:
        rows = 0
        for eqn in jaxpr.eqns:
            rows = max([rows, *(v.aval.shape[0] for v in eqn.outvars if v.aval.shape[1:] == (V,))])
            if eqn.primitive.name == "cond":
                switches.append([most(branch.jaxpr) for branch in eqn.params["branches"]])
                continue
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                rows = max(rows, most(inner) if hasattr(inner, "eqns") else 0)
        return rows

    outside = most(found)
    assert len(switches) == 1
    return outside, switches[0]


def test_logits_are_computed_at_the_packed_size_only():
    """Outside of the packed branches, the gradient of the kernel is the only array of vocabulary width."""
    outside, packed = rows_of_logits()
    assert packed == losses_lib.sizes(TOKENS)
    assert outside <= HEAD_DIM


def test_tokens_are_packed_to_the_smallest_size_that_fits():
    sizes = losses_lib.sizes(TOKENS)
    assert len(sizes) > 2
    assert sizes[0] < 0.75 * TOKENS
    assert packed_sizes() == [min(size for size in sizes if size >= real) for real in range(TOKENS + 1)]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 1000, 16 * 5 * 24])
def test_sizes_are_few_and_rise_to_all_tokens(tokens):
    sizes = losses_lib.sizes(tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == tokens
    assert len(sizes) <= 6
    assert sizes[0] <= tokens / 2 + 64
    assert max(np.diff(sizes), default=0) <= 0.15 * tokens + 64


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("real", [5, 256, 257, 399])
def test_states_at_padding_do_not_matter(real, bad):
    """They change neither sums nor gradients, at any packed size, even if they are NaN."""
    weights, states_MS, targets_M = make(TOKENS, real)
    spoilt_MS = jnp.where((targets_M == PAD)[:, None], bad, states_MS)
    assert not np.array_equal(spoilt_MS, states_MS)
    jax.tree.map(
        np.testing.assert_array_equal,
        fast_gradients(weights, spoilt_MS, targets_M),
        fast_gradients(weights, states_MS, targets_M),
    )


def test_gradients_scale_with_the_gradient_of_the_objective():
    """The objective may be one term of a mean over tokens. Counts have no gradient."""
    weights, states_MS, targets_M = make(TOKENS, 300)
    (grads, losses) = fast_gradients(weights, states_MS, targets_M)

    def scaled(weights: Any, states_MS: Any) -> jax.Array:
        losses = fast(weights, states_MS, targets_M)
        return -3 * losses.objective / losses.sums.tokens + 5 * losses.sums.right

    expected = jax.tree.map(lambda x: x * (-3 / losses.sums.tokens), grads)
    assert_near(jax.jit(jax.grad(scaled, (0, 1)))(weights, states_MS), expected, 1e-6)

    def counts(weights: Any) -> jax.Array:
        losses = fast(weights, states_MS, targets_M)
        return losses.sums.tokens + losses.sums.right + losses.sums.nats + losses.nats_M.sum()

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(counts))(weights)))


def test_right_counts_tokens_whose_logit_is_the_largest_ties_included():
    """Logits of bfloat16 states often tie."""
    weights, states_MS, _ = make(TOKENS, TOKENS)
    best_M = output_layer.logits(weights, states_MS).argmax(-1)
    targets_M = jnp.where(jnp.arange(TOKENS) < 7, best_M, (best_M + 1) % V)
    right = ((targets_M == best_M) & (targets_M != PAD)).sum()
    assert 0 < right <= 7
    assert fast(weights, states_MS, targets_M).sums.right == right

    equal = jax.tree.map(jnp.zeros_like, weights)
    assert fast(equal, states_MS, jnp.arange(TOKENS) % V).sums.right == (jnp.arange(TOKENS) % V != PAD).sum()


def test_large_logits_overflow_nothing():
    weights, states_MS, targets_M = make(TOKENS, 300)
    weights.vocabulary["kernel"] = 300 * weights.vocabulary["kernel"]
    grads, losses = fast_gradients(weights, states_MS, targets_M)
    expected_grads, expected = gradients(plain, weights, states_MS, targets_M)
    assert_same(losses, expected)
    assert_near(grads, expected_grads, 2e-5)


def test_bfloat16_states_give_float32_sums_near_those_of_float32():
    """Sums within 0.5%; gradients within 3% of their largest value, in the dtype of their argument."""
    weights, states_MS, targets_M = make(TOKENS, 300)
    half_MS = states_MS.astype(jnp.bfloat16)
    (d_weights, d_half_MS), losses = fast_gradients(weights, half_MS, targets_M)
    (expected, d_states_MS), expected_losses = gradients(plain, weights, half_MS.astype(jnp.float32), targets_M)
    assert {x.dtype for x in jax.tree.leaves((losses, d_weights))} == {jnp.dtype("float32")}
    assert d_half_MS.dtype == jnp.bfloat16
    np.testing.assert_allclose(losses.sums.nats, expected_losses.sums.nats, rtol=5e-3)
    np.testing.assert_allclose(losses.objective, expected_losses.objective, rtol=5e-3)
    assert_near((d_weights, d_half_MS.astype(jnp.float32)), (expected, d_states_MS), 0.03)


@pytest.mark.parametrize(("smoothing", "tanh"), [(0.1, False), (0.7, True)])
def test_label_smoothing_mixes_the_target_with_all_words(smoothing, tanh):
    """It changes the objective and its gradients. The sums and each token's loss stay the plain cross-entropy."""
    ours, slow = (jax.jit(lambda *args, f=f: gradients(f, *args, None, smoothing)) for f in (fast, plain))
    without = jax.jit(fast)
    for real in (0, 1, 256, 399):
        arguments = make(TOKENS, real, tanh=tanh)
        (grads, losses), (expected_grads, expected) = ours(*arguments), slow(*arguments)
        assert_same(losses, expected)
        assert_near(grads, expected_grads)
        unsmoothed = without(*arguments)
        assert_same(losses._replace(objective=unsmoothed.objective), unsmoothed, 1e-6)
        assert (real == 0) or abs(losses.objective - unsmoothed.objective) > 1e-3 * unsmoothed.objective


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_change_only_the_objective(smoothing):
    """Positive, zero and negative weights. The sums and each token's loss do not depend on them."""
    weights, states_MS, targets_M = make(TOKENS, 300)
    weight_M = jnp.asarray(np.random.default_rng(1).choice([-1.5, 0.0, 0.5, 2.0], TOKENS), jnp.float32)
    ours, slow = (jax.jit(lambda *args, f=f: gradients(f, *args, smoothing)) for f in (fast, plain))
    arguments = weights, states_MS, targets_M, weight_M
    (grads, losses), (expected_grads, expected) = ours(*arguments), slow(*arguments)
    assert_same(losses, expected, 1e-5)
    assert_near(grads, expected_grads)
    unweighted = jax.jit(fast)(weights, states_MS, targets_M)
    assert_same(losses._replace(objective=unweighted.objective), unweighted, 1e-6)
    d_states_MS = np.asarray(grads[1])
    assert (d_states_MS[(weight_M == 0) | (targets_M == PAD)] == 0).all()
    assert (np.abs(d_states_MS[(weight_M != 0) & (targets_M != PAD)]).max(-1) > 0).all()


def test_a_negative_weight_negates_the_gradient():
    weights, states_MS, targets_M = make(TOKENS, 300)
    grads, _ = fast_gradients(weights, states_MS, targets_M, jnp.ones(TOKENS))
    turned, _ = fast_gradients(weights, states_MS, targets_M, -jnp.ones(TOKENS))
    assert_near(turned, jax.tree.map(jnp.negative, grads), 1e-6)


@pytest.mark.parametrize("tanh", [False, True])
def test_folded_layers_give_the_same_logits(tanh):
    """Without tanh between them the two layers become one. Folding twice changes nothing."""
    weights, states_MS, _ = make(TOKENS, 0, tanh=tanh)
    folded = output_layer.fold(weights)
    assert (folded.head is None) == (not tanh)
    logits_MV = output_layer.logits(weights, states_MS)
    np.testing.assert_allclose(output_layer.logits(folded, states_MS), logits_MV, atol=1e-5)
    again = output_layer.fold(folded)
    assert jax.tree.structure(again) == jax.tree.structure(folded)
    jax.tree.map(np.testing.assert_array_equal, again, folded)
    assert logits_MV.dtype == jnp.float32
