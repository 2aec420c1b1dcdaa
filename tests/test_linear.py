"""A linear layer's product and its gradients are those of JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.linear import dot_general, kernel_gradient

SHAPES = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=8)  # each four programs to compile
@given(SHAPES, st.sampled_from(["float32", "bfloat16"]))
def test_a_layer_is_the_same_function_with_the_same_gradients(shape, dtype):
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
    for ours, theirs in zip(found(dot_general=dot_general), found(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_kernels_gradient_is_summed_in_float32():
    """In bfloat16, 1 added to 256 is 256."""
    ones = jnp.ones((4, 1000, 1), jnp.bfloat16)
    found = kernel_gradient(ones, ones)
    assert found.dtype == jnp.float32
    assert found.tolist() == [[4000.0]]
