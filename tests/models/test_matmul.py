"""A linear layer with `matmul.dot_general` gives the outputs and gradients of JAX's own product."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.models.matmul import dot_general, kernel_gradient, product

SHAPES = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=8)  # each example compiles four programs
@given(SHAPES, st.sampled_from(["float32", "bfloat16"]))
def test_outputs_and_gradients_equal_those_of_jax(shape, dtype):
    *leading, inner, columns = *shape[0], *shape[1:]
    rng = np.random.default_rng(inner)
    x = rng.standard_normal((*leading, inner)).astype(np.float32)
    d_y = rng.standard_normal((*leading, columns)).astype(np.float32)

    def found(**options):
        layer = nnx.Linear(inner, columns, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0), **options)
        graph, state = nnx.split(layer)
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x).astype(jnp.float32), state, x)
        return y, *jax.tree.leaves(pull(jnp.asarray(d_y)))

    tolerance = {"float32": 1e-5, "bfloat16": 4e-2}[dtype]
    for ours, theirs in zip(found(dot_general=dot_general(dtype)), found(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=8)
@given(SHAPES, st.integers(0, 2**32))
def test_rounded_numbers_are_multiplied_and_summed_in_float32(shape, seed):
    """Products of bfloat16 numbers are exact in float32. Only the order of the sum may differ."""
    *leading, inner, columns = *shape[0], *shape[1:]
    rng = np.random.default_rng(seed)
    x, kernel, d_y = (
        rng.standard_normal(s).astype(np.float32) for s in ((*leading, inner), (inner, columns), (*leading, columns))
    )
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, "bfloat16"), x, kernel)
    d_x, d_kernel = pull(jnp.asarray(d_y))
    rounded, k, d = (np.asarray(v, jnp.bfloat16).astype(np.float32) for v in (x, kernel, d_y))
    rows = rounded.reshape(-1, inner)
    expected = rounded @ k, d @ k.T, rows.T @ d.reshape(-1, columns)
    for ours, theirs in zip(map(np.asarray, (y, d_x, d_kernel)), expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(y) - x @ kernel).max() > 0


def test_a_kernels_gradient_is_summed_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    ones = jnp.ones((4, 1000, 1), jnp.bfloat16)
    found = kernel_gradient(ones, ones, "bfloat16")
    assert found.dtype == jnp.float32
    assert found.tolist() == [[4000.0]]
