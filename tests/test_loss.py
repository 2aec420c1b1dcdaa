"""The packed loss, whose gradients are computed on the way forward, is -log softmax summed over the real tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap import loss
from flaxcap.text import PAD

H, D, V = 5, 6, 11
PLACES = 400


def make(places: int, real: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Weights, hidden_NH and targets_N, `real` of which are no <pad>, at random places."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    weights = {
        "head": {"kernel": normal(H, D), "bias": normal(D)},
        "vocabulary": {"kernel": normal(D, V), "bias": normal(V)},
    }
    targets_N = rng.integers(PAD + 1, V, places)
    targets_N[rng.permutation(places)[real:]] = PAD
    return weights, normal(places, H), jnp.asarray(targets_N, jnp.int32)


def plain(weights: Any, hidden_NH: Any, targets_N: Any) -> loss.Sums:
    """By log_softmax, of all places, those of <pad> thrown away."""
    head, vocabulary = weights["head"], weights["vocabulary"]
    states_ND = hidden_NH @ head["kernel"] + head["bias"][None]
    log_p_NV = jax.nn.log_softmax(states_ND @ vocabulary["kernel"] + vocabulary["bias"][None])
    real_N = targets_N != PAD
    nats = -jnp.where(real_N, log_p_NV[jnp.arange(len(targets_N)), targets_N], 0).sum()
    right = (log_p_NV.argmax(-1) == targets_N) & real_N
    return loss.Sums(nats, *(x.sum(dtype=jnp.float32) for x in (real_N, right)))


def gradients(function: Any, weights: Any, hidden_NH: Any, targets_N: Any) -> tuple[Any, loss.Sums]:
    def nats(weights: Any, hidden_NH: Any) -> tuple[jax.Array, loss.Sums]:
        sums = function(weights, hidden_NH, targets_N)
        return sums.nats, sums

    return jax.grad(nats, (0, 1), has_aux=True)(weights, hidden_NH)


fast_gradients = jax.jit(lambda *arguments: gradients(loss.token_losses, *arguments))


def assert_near(ours: Any, expected: Any, tolerance: float = 5e-6) -> None:
    """Every leaf within `tolerance` of its largest value."""

    def compare(a: jax.Array, b: jax.Array) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, 0, tolerance * max(np.abs(b).max(), 1e-6))

    jax.tree.map(compare, ours, expected)


@pytest.mark.parametrize("places", [1, 2, 65, 130, PLACES])
def test_sums_and_gradients_are_those_of_log_softmax(places):
    """At no real token, one, each size that tokens are packed to, one fewer and one more, all."""
    fast, slow = (jax.jit(functools.partial(gradients, f)) for f in (loss.token_losses, plain))
    alone = jax.jit(loss.token_losses)
    counts = {0, 1, *(size + more for size in loss.sizes(places) for more in (-1, 0, 1))}
    for real in sorted(counts - {places + 1}):
        arguments = make(places, real, seed=real)
        (grads, sums), (expected_grads, expected) = fast(*arguments), slow(*arguments)
        np.testing.assert_allclose(sums, expected, rtol=5e-6)
        np.testing.assert_allclose(alone(*arguments), expected, rtol=5e-6)
        assert_near(grads, expected_grads)
        assert sums.tokens == real
        assert (np.asarray(grads[1])[np.asarray(arguments[2]) == PAD] == 0).all()


def packed_sizes() -> list[int]:
    """How many places are computed, for each number of real tokens."""
    weights, hidden_NH, _ = make(PLACES, 0)

    @jax.jit
    def size(targets_N: jax.Array) -> Any:
        return loss._packed(lambda _w, hidden, *_: jnp.int32(len(hidden)), weights, hidden_NH, targets_N)

    return [int(size(make(PLACES, real)[2])) for real in range(PLACES + 1)]


def rows_of_logits() -> tuple[int, list[int]]:
    """The most rows that an array of vocabulary width has: outside of the packed computations, and in each of them."""
    found = jax.make_jaxpr(fast_gradients)(*make(PLACES, PLACES)).jaxpr
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


def test_no_logits_are_computed_but_of_the_packed_size():
    """And none outside of the packed computations: of that width there is only the kernel's own gradient, D rows."""
    outside, packed = rows_of_logits()
    assert packed == loss.sizes(PLACES)
    assert outside <= D


def test_tokens_are_packed_to_the_least_size_that_holds_them():
    sizes = loss.sizes(PLACES)
    assert len(sizes) > 2
    assert sizes[0] < 0.75 * PLACES
    assert packed_sizes() == [min(size for size in sizes if size >= real) for real in range(PLACES + 1)]


@pytest.mark.parametrize("places", [1, 63, 64, 65, 127, 128, 129, 1000, 16 * 5 * 24])
def test_sizes_are_few_and_rise_to_all_places(places):
    sizes = loss.sizes(places)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == places
    assert len(sizes) <= 6
    assert sizes[0] <= places / 2 + 64


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("real", [5, 256, 257, 399])
def test_what_the_states_of_padded_places_hold_never_matters(real, bad):
    """Not even NaN, and whatever the packed size: neither in the sums nor in any gradient."""
    weights, hidden_NH, targets_N = make(PLACES, real)
    spoilt_NH = jnp.where((targets_N == PAD)[:, None], bad, hidden_NH)
    assert not np.array_equal(spoilt_NH, hidden_NH)
    jax.tree.map(
        np.testing.assert_array_equal,
        fast_gradients(weights, spoilt_NH, targets_N),
        fast_gradients(weights, hidden_NH, targets_N),
    )


def test_gradients_scale_with_that_of_the_loss():
    """Of a mean over tokens, and of a loss that this is one term of; counts have no gradient."""
    weights, hidden_NH, targets_N = make(PLACES, 300)
    (grads, sums) = fast_gradients(weights, hidden_NH, targets_N)

    def scaled(weights: Any, hidden_NH: Any) -> jax.Array:
        sums = loss.token_losses(weights, hidden_NH, targets_N)
        return -3 * sums.nats / sums.tokens + 5 * sums.right

    expected = jax.tree.map(lambda x: x * (-3 / sums.tokens), grads)
    assert_near(jax.jit(jax.grad(scaled, (0, 1)))(weights, hidden_NH), expected, 1e-6)

    def counts(weights: Any) -> jax.Array:
        sums = loss.token_losses(weights, hidden_NH, targets_N)
        return sums.tokens + sums.right

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(counts))(weights)))


def test_right_counts_tokens_that_are_most_likely_one_of_several_included():
    """Where logits tie, a token among the largest is right: bfloat16's often do."""
    weights, hidden_NH, _ = make(PLACES, PLACES)
    best_N = loss.logits(weights, hidden_NH).argmax(-1)
    targets_N = jnp.where(jnp.arange(PLACES) < 7, best_N, (best_N + 1) % V)
    right = ((targets_N == best_N) & (targets_N != PAD)).sum()
    assert 0 < right <= 7
    assert loss.token_losses(weights, hidden_NH, targets_N).right == right

    equal = jax.tree.map(jnp.zeros_like, weights)
    assert loss.token_losses(equal, hidden_NH, jnp.arange(PLACES) % V).right == (jnp.arange(PLACES) % V != PAD).sum()


def test_large_logits_overflow_nothing():
    weights, hidden_NH, targets_N = make(PLACES, 300)
    weights["vocabulary"]["kernel"] = 300 * weights["vocabulary"]["kernel"]
    grads, sums = fast_gradients(weights, hidden_NH, targets_N)
    expected_grads, expected = gradients(plain, weights, hidden_NH, targets_N)
    np.testing.assert_allclose(sums, expected, rtol=5e-6)
    assert_near(grads, expected_grads, 2e-5)


def test_bfloat16_states_give_float32_sums_near_those_of_float32():
    """Within 0.5%; gradients within 3% of their largest, of the type of what they are gradients of."""
    weights, hidden_NH, targets_N = make(PLACES, 300)
    half_NH = hidden_NH.astype(jnp.bfloat16)
    (d_weights, d_half_NH), sums = fast_gradients(weights, half_NH, targets_N)
    (expected, d_hidden_NH), expected_sums = gradients(plain, weights, half_NH.astype(jnp.float32), targets_N)
    assert {x.dtype for x in (*sums, *jax.tree.leaves(d_weights))} == {jnp.dtype("float32")}
    assert d_half_NH.dtype == jnp.bfloat16
    np.testing.assert_allclose(sums.nats, expected_sums.nats, rtol=5e-3)
    assert_near((d_weights, d_half_NH.astype(jnp.float32)), (expected, d_hidden_NH), 0.03)
