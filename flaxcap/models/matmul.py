"""The product of a linear layer, of numbers that may be rounded for it, with gradients that are quick on a CPU too."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.cache  # one for each type: models are compared by what they are made of
def dot_general(dtype: str) -> Callable:
    """For `nnx.Linear(dot_general=...)`, which contracts the last axis of x [..., X] with the first of [X, Y]."""

    def multiply(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
        del dimension_numbers, options  # as told above, and as JAX has them
        return product(x, kernel, dtype)

    return multiply


def product(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """x [..., X] @ kernel [X, Y] of numbers rounded to `dtype`; the sums are of x's type, as the result."""
    return _product(x, kernel, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=x.dtype)


def _forward(x: jax.Array, kernel: jax.Array, dtype: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel, dtype), (x.astype(dtype), kernel)


def _backward(dtype: str, kept: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rounded = d_y.astype(dtype), kernel.astype(dtype)
    d_x = jnp.tensordot(*rounded, ((d_y.ndim - 1,), (1,)), preferred_element_type=d_y.dtype)
    return d_x, kernel_gradient(x, d_y, dtype).astype(kernel.dtype)


_product.defvjp(_forward, _backward)


def kernel_gradient(x: jax.Array, d_y: jax.Array, dtype: str) -> jax.Array:
    """Float32 [X, Y] of inputs [..., X] and the outputs' gradients [..., Y], both rounded to `dtype`.

    Written [X, Y]: JAX's own, [Y, X] and then turned, is a product that XLA has no quick code for on a CPU.
    """
    leading = tuple(range(x.ndim - 1))
    x, d_y = x.astype(dtype), d_y.astype(dtype)
    return jnp.tensordot(x, d_y, (leading, leading), preferred_element_type=jnp.float32)
