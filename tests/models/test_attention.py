"""Attention through reciprocals of exponentials equals the tanh formula, and so do its gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.models import attention
from flaxcap.models.attention import LARGEST, attend, exp_keys

I, A, D = 2, 7, 5
WIDE = 96  # a multiple of 32: the CPU's code sums vectors of 32


def plain(keys_IPA: Any, values_IPD: Any, score_A: Any, query_ICA: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the context and alpha by the formula of Bahdanau et al."""
    alpha_ICP = jax.nn.softmax(jnp.tanh(keys_IPA[:, None] + query_ICA[:, :, None]) @ score_A)
    return jnp.einsum("icp,ipd->icd", alpha_ICP, values_IPD), alpha_ICP


def fast(keys_IPA: Any, values_IPD: Any, score_A: Any, query_ICA: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the context and alpha by `exp_keys` and `attend`. Only together do they give the keys' gradients."""
    alpha_ICP = attend(exp_keys(keys_IPA), score_A, query_ICA)
    return jnp.einsum("icp,ipd->icd", alpha_ICP.astype(values_IPD.dtype), values_IPD), alpha_ICP


def arguments(
    captions: int = 3, positions: int = 6, scale: float = 1.0, seed: int = 0, dtype: Any = np.float32, width: int = A
):
    """Returns keys_IPA, values_IPD, score_A and query_ICA. Keys and queries are uniform in -scale … scale."""
    rng = np.random.default_rng(seed)
    keys_IPA, query_ICA = (scale * rng.uniform(-1, 1, (I, n, width)) for n in (positions, captions))
    values_IPD, score_A = rng.standard_normal((I, positions, D)), rng.standard_normal(width)
    return [jnp.asarray(x, dtype) for x in (keys_IPA, values_IPD, score_A, query_ICA)]


def results(function: Callable, args: list, weigh: str = "both", seed: int = 1) -> tuple[Any, Any]:
    """Returns (context, alpha), and the gradients of a random linear function of them.

    Args:
      function: `plain` or `fast`.
      args: its four arguments. There is a gradient for each.
      weigh: what the linear function takes: "context", "alpha" or "both".
      seed: of its coefficients.
    """
    rng = np.random.default_rng(seed)
    context, alpha = jax.eval_shape(function, *args)
    by_context, by_alpha = (jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (context, alpha))

    def total(*args: Any) -> tuple[jax.Array, Any]:
        context_ICD, alpha_ICP = function(*args)
        totals = {"context": (context_ICD * by_context).sum(), "alpha": (alpha_ICP * by_alpha).sum()}
        totals["both"] = totals["context"] + totals["alpha"]
        return totals[weigh], (context_ICD, alpha_ICP)

    grads, found = jax.grad(total, (0, 1, 2, 3), has_aux=True)(*args)
    return found, grads


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Asserts that no number differs by more than `tolerance` times the largest number of its array."""
    for name, a, b in zip(("keys", "values", "score", "query"), ours, expected, strict=False):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, 0, tolerance * max(np.abs(b).max(), 1e-2), err_msg=name)


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
    """Runs a test with the CPU's code, and with the code of all other platforms."""
    if request.param == "accelerator":
        monkeypatch.setattr(attention, "_scores_on_cpu", attention._scores_by_caption)
        monkeypatch.setattr(attention, "_sums_on_cpu", attention._sums_by_caption)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("captions", "positions", "width"), [(3, 6, A), (1, 6, A), (3, 1, A), (2, 64, A), (3, 6, WIDE)]
)
def test_context_weights_and_gradients_equal_the_formulas(captions, positions, width, jit):
    args = arguments(captions, positions, 2.0, width=width)
    found, grads = results(jax.jit(lambda *args: fast(*args)) if jit else fast, args)
    expected, expected_grads = results(plain, args)
    assert_near(found, expected, 2e-6)
    assert_near(grads, expected_grads, 5e-6)


@pytest.mark.parametrize("weigh", ["context", "alpha"])
def test_context_and_weights_each_have_their_own_gradient(weigh):
    """A loss may depend on the context, on the attention weights, or on both."""
    args = arguments(scale=2.0)
    _, grads = results(fast, args, weigh)
    _, expected = results(plain, args, weigh)
    assert_near(grads, expected, 5e-6)
    assert np.abs(grads[0]).max() > 1e-3
    assert (np.abs(grads[1]).max() > 0) == (weigh == "context")


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0, 15.0, LARGEST])
def test_it_equals_the_formula_while_neither_key_nor_query_is_clipped(scale):
    """In the second case keys and queries have opposite signs: both exponentials are far from 1, and tanh is not."""
    args = arguments(positions=20, scale=scale)
    opposite = [*args[:3], -0.99 * args[0][:, :3]]  # of caption c, at position c
    for case in (args, opposite):
        found, grads = results(fast, case)
        expected, expected_grads = results(plain, case)
        assert_near(found, expected, 1e-5)
        # At a small scale the terms of the query's gradient nearly cancel, in both computations.
        assert_near(grads, expected_grads, 1e-4)


@pytest.mark.usefixtures("platform")
def test_beyond_the_clip_everything_is_finite_and_saturated_energies_are_exact():
    """Keys and queries go up to 100. Where they have one sign, results equal the formula."""
    ends = jnp.array([-100.0, -60, -41, -40, -1, 0, 1, 40, 41, 60, 100])
    keys_IPA, query_ICA = (jnp.broadcast_to(ends[None, :, None], (I, len(ends), A)) for _ in range(2))
    _, values_IPD, score_A, _ = arguments(positions=len(ends))
    args = [keys_IPA, values_IPD, score_A, query_ICA]
    for array in jax.tree.leaves(results(fast, args)):
        assert np.isfinite(array).all()

    same_sign = [jnp.abs(keys_IPA), values_IPD, score_A, jnp.abs(query_ICA)]
    for sign in (1, -1):
        case = [sign * same_sign[0], *same_sign[1:3], sign * same_sign[3]]
        found, grads = results(fast, case)
        expected, expected_grads = results(plain, case)
        assert_near(found, expected, 1e-5)
        assert_near(grads, expected_grads, 3e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_weights_sum_to_one(scale, dtype):
    _, alpha_ICP = fast(*arguments(positions=64, scale=scale, dtype=dtype))
    assert alpha_ICP.dtype == jnp.float32
    assert (alpha_ICP >= 0).all()
    np.testing.assert_allclose(alpha_ICP.sum(-1), 1, atol=1e-6)


@pytest.mark.usefixtures("platform")
def test_bfloat16_is_near_the_formula_in_float32():
    """Errors are at most 3% of an array's largest number. The attention weights stay float32."""
    args = arguments(scale=2.0, dtype=jnp.bfloat16)
    found, grads = results(fast, args)
    expected, expected_grads = results(plain, [x.astype(jnp.float32) for x in args])
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
    assert {x.dtype for x in grads} == {jnp.dtype(jnp.bfloat16)}
    assert_near(found, expected, 0.03)
    assert_near(grads, expected_grads, 0.03)


def test_bfloat16_is_finite_up_to_a_hundred():
    for array in jax.tree.leaves(results(fast, arguments(positions=64, scale=100.0, dtype=jnp.bfloat16))):
        assert np.isfinite(np.asarray(array, np.float32)).all()


def test_residuals_are_smaller_than_the_energies():
    """The gradient of the plain formula keeps several arrays of the energies' size."""
    captions, positions = 4, 64
    args = arguments(captions, positions)
    energies = I * captions * positions * A

    def kept(function: Callable) -> int:
        return max(x.size for x in jax.tree.leaves(jax.vjp(function, *args)[1]))

    assert kept(fast) < energies
    assert kept(plain) >= energies


# Images with fewer positions than others


@pytest.mark.usefixtures("platform")
def test_unused_positions_have_no_weight_and_no_gradient():
    """Weights, contexts and gradients equal those of each image without its unused positions."""
    args = arguments(positions=6, scale=2.0)
    rng = np.random.default_rng(3)
    valid_IP = np.stack([rng.permutation(np.arange(6) < positions) for positions in (2, 5)])

    def masked(keys_IPA: Any, values_IPD: Any, score_A: Any, query_ICA: Any) -> tuple[jax.Array, jax.Array]:
        alpha_ICP = attend(exp_keys(keys_IPA), score_A, query_ICA, jnp.asarray(valid_IP))
        return jnp.einsum("icp,ipd->icd", alpha_ICP, values_IPD), alpha_ICP

    def shortened(keys_IPA: Any, values_IPD: Any, score_A: Any, query_ICA: Any) -> tuple[jax.Array, jax.Array]:
        contexts, alphas = [], []
        for i in range(I):
            image, used = slice(i, i + 1), np.flatnonzero(valid_IP[i])
            context, alpha = plain(keys_IPA[image, used], values_IPD[image, used], score_A, query_ICA[image])
            contexts.append(context[0])
            alphas.append(jnp.zeros((3, 6)).at[:, used].set(alpha[0]))
        return jnp.stack(contexts), jnp.stack(alphas)

    found, grads = results(masked, args)
    expected, expected_grads = results(shortened, args)
    assert_near(found, expected, 2e-6)
    assert_near(grads, expected_grads, 5e-6)
    assert (np.moveaxis(np.asarray(found[1]), 1, 2)[~valid_IP] == 0).all()
    assert all((np.asarray(grad)[~valid_IP] == 0).all() for grad in grads[:2])
