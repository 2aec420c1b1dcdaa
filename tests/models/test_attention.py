"""Attention through reciprocals of exponentials is the tanh formula, and its backward that formula's gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.models import attention
from flaxcap.models.attention import LARGEST, attend, grow

I, A, E = 2, 7, 5
WIDE = 96  # a CPU sums whole vectors of it


def plain(keys_IPA: Any, values_IPE: Any, score_A: Any, query_ICA: Any) -> tuple[jax.Array, jax.Array]:
    """The formula as Bahdanau et al. have it."""
    alpha_ICP = jax.nn.softmax(jnp.tanh(keys_IPA[:, None] + query_ICA[:, :, None]) @ score_A)
    return jnp.einsum("icp,ipe->ice", alpha_ICP, values_IPE), alpha_ICP


def fast(keys_IPA: Any, values_IPE: Any, score_A: Any, query_ICA: Any) -> tuple[jax.Array, jax.Array]:
    """`grow` and `attend` together: only so are the gradients those of the keys. And the sum that the cell makes."""
    alpha_ICP = attend(grow(keys_IPA), score_A, query_ICA)
    return jnp.einsum("icp,ipe->ice", alpha_ICP.astype(values_IPE.dtype), values_IPE), alpha_ICP


def arguments(
    captions: int = 3, positions: int = 6, scale: float = 1.0, seed: int = 0, dtype: Any = np.float32, width: int = A
):
    """keys_IPA, values_IPE, score_A, query_ICA; keys and queries spread over -scale … scale."""
    rng = np.random.default_rng(seed)
    keys_IPA, query_ICA = (scale * rng.uniform(-1, 1, (I, n, width)) for n in (positions, captions))
    values_IPE, score_A = rng.standard_normal((I, positions, E)), rng.standard_normal(width)
    return [jnp.asarray(x, dtype) for x in (keys_IPA, values_IPE, score_A, query_ICA)]


def results(function: Callable, args: list, weigh: str = "both", seed: int = 1) -> tuple[Any, Any]:
    """(context, alpha), and the gradients by all four arguments of a random weighing of context, alpha or both."""
    rng = np.random.default_rng(seed)
    context, alpha = jax.eval_shape(function, *args)
    by_context, by_alpha = (jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (context, alpha))

    def total(*args: Any) -> tuple[jax.Array, Any]:
        context_ICE, alpha_ICP = function(*args)
        found = {"context": (context_ICE * by_context).sum(), "alpha": (alpha_ICP * by_alpha).sum()}
        found["both"] = found["context"] + found["alpha"]
        return found[weigh], (context_ICE, alpha_ICP)

    grads, found = jax.grad(total, (0, 1, 2, 3), has_aux=True)(*args)
    return found, grads


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Every array within `tolerance` of its largest value."""
    for name, a, b in zip(("keys", "values", "score", "query"), ours, expected, strict=False):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, 0, tolerance * max(np.abs(b).max(), 1e-2), err_msg=name)


@pytest.fixture(params=["cpu", "elsewhere"])
def platform(request, monkeypatch):
    """Scores and backward are written twice; what accelerators run is tested here too."""
    if request.param == "elsewhere":
        monkeypatch.setattr(attention, "_scores_on_a_cpu", attention._scores_by_caption)
        monkeypatch.setattr(attention, "_sums_on_a_cpu", attention._sums_by_caption)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("captions", "positions", "width"), [(3, 6, A), (1, 6, A), (3, 1, A), (2, 64, A), (3, 6, WIDE)]
)
def test_context_weights_and_gradients_are_the_formulas(captions, positions, width, jit):
    args = arguments(captions, positions, 2.0, width=width)
    found, grads = results(jax.jit(lambda *args: fast(*args)) if jit else fast, args)
    expected, expected_grads = results(plain, args)
    assert_near(found, expected, 2e-6)
    assert_near(grads, expected_grads, 5e-6)


@pytest.mark.parametrize("weigh", ["context", "alpha"])
def test_context_and_weights_each_have_their_own_gradient(weigh):
    """The loss may use the attention weights too."""
    args = arguments(scale=2.0)
    _, grads = results(fast, args, weigh)
    _, expected = results(plain, args, weigh)
    assert_near(grads, expected, 5e-6)
    assert np.abs(grads[0]).max() > 1e-3
    assert (np.abs(grads[1]).max() > 0) == (weigh == "context")


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0, 15.0, LARGEST])
def test_it_is_the_formula_as_long_as_neither_key_nor_query_is_clipped(scale):
    """Also where a large key meets a large query of the other sign, and both exponentials are far from 1."""
    args = arguments(positions=20, scale=scale)
    opposite = [*args[:3], -0.99 * args[0][:, :3]]  # of caption c, at position c
    for case in (args, opposite):
        found, grads = results(fast, case)
        expected, expected_grads = results(plain, case)
        assert_near(found, expected, 1e-5)
        # A small scale: the query's gradient is a sum that all but cancels, in either computation.
        assert_near(grads, expected_grads, 1e-4)


@pytest.mark.usefixtures("platform")
def test_beyond_the_clip_everything_stays_finite_and_saturated_tokens_stay_right():
    """Up to 100, in every combination of signs; exact still where key and query do not cancel."""
    ends = jnp.array([-100.0, -60, -41, -40, -1, 0, 1, 40, 41, 60, 100])
    keys_IPA, query_ICA = (jnp.broadcast_to(ends[None, :, None], (I, len(ends), A)) for _ in range(2))
    _, values_IPE, score_A, _ = arguments(positions=len(ends))
    args = [keys_IPA, values_IPE, score_A, query_ICA]
    for array in jax.tree.leaves(results(fast, args)):
        assert np.isfinite(array).all()

    same_sign = [jnp.abs(keys_IPA), values_IPE, score_A, jnp.abs(query_ICA)]
    for sign in (1, -1):
        case = [sign * same_sign[0], *same_sign[1:3], sign * same_sign[3]]
        found, grads = results(fast, case)
        expected, expected_grads = results(plain, case)
        assert_near(found, expected, 1e-5)
        assert_near(grads, expected_grads, 3e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_weights_add_up_to_one(scale, dtype):
    _, alpha_ICP = fast(*arguments(positions=64, scale=scale, dtype=dtype))
    assert alpha_ICP.dtype == jnp.float32
    assert (alpha_ICP >= 0).all()
    np.testing.assert_allclose(alpha_ICP.sum(-1), 1, atol=1e-6)


@pytest.mark.usefixtures("platform")
def test_bfloat16_is_near_the_formula_in_float32():
    """Within 3% of each array's largest value; results and gradients in the arguments' type, the weights float32."""
    args = arguments(scale=2.0, dtype=jnp.bfloat16)
    found, grads = results(fast, args)
    expected, expected_grads = results(plain, [x.astype(jnp.float32) for x in args])
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
    assert {x.dtype for x in grads} == {jnp.dtype(jnp.bfloat16)}
    assert_near(found, expected, 0.03)
    assert_near(grads, expected_grads, 0.03)


def test_bfloat16_stays_finite_up_to_a_hundred():
    for array in jax.tree.leaves(results(fast, arguments(positions=64, scale=100.0, dtype=jnp.bfloat16))):
        assert np.isfinite(np.asarray(array, np.float32)).all()


def test_what_the_backward_pass_keeps_is_smaller_than_the_energies():
    """It is what the formula's own gradient would keep several times."""
    captions, positions = 4, 64
    args = arguments(captions, positions)
    energies = I * captions * positions * A

    def kept(function: Callable) -> int:
        return max(x.size for x in jax.tree.leaves(jax.vjp(function, *args)[1]))

    assert kept(fast) < energies
    assert kept(plain) >= energies
