"""The product of a linear layer, with a kernel's gradient that is quick on a CPU too."""

from typing import Any

import jax
import jax.numpy as jnp


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """For `nnx.Linear(dot_general=...)`, which contracts the last axis of x [..., X] with the first of [X, Y]."""
    del dimension_numbers, options  # as told above, and as JAX has them
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _backward(kept: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    return d_y @ kernel.T, kernel_gradient(x, d_y).astype(kernel.dtype)


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _backward)


def kernel_gradient(x: jax.Array, d_y: jax.Array) -> jax.Array:
    """Float32 [X, Y] of inputs [..., X] and the outputs' gradients [..., Y].

    Written [X, Y]: JAX's own, [Y, X] and then turned, is a product that XLA has no quick code for on a CPU.
    """
    leading = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, d_y, (leading, leading), preferred_element_type=jnp.float32)
