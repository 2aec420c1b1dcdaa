"""Matrix products of linear layers: inputs may be rounded, and the kernel's gradient is fast on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.cache  # one function for each dtype: JAX compares models by the functions that they hold
def dot_general(dtype: str) -> Callable:
    """Returns `product` in this dtype, for `nnx.Linear(dot_general=...)`."""

    def multiply(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
        # nnx.Linear always contracts the last axis with the first; these arguments carry no information.
        del dimension_numbers, options
        return product(x, kernel, dtype)

    return multiply


def product(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """Returns `x [..., inputs] @ kernel [inputs, outputs]` of numbers rounded to `dtype`, summed in the dtype of x."""
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
    """Returns the gradient of a kernel, float32 `[inputs, outputs]`.

    JAX's own gradient is a product `[outputs, inputs]` and a transpose. XLA:CPU (jaxlib 0.10) has no fast code for it.

    Args:
      x: the layer's inputs, `[..., inputs]`.
      d_y: gradients of its outputs, `[..., outputs]`.
      dtype: both are rounded to it.
    """
    leading = tuple(range(x.ndim - 1))
    x, d_y = x.astype(dtype), d_y.astype(dtype)
    return jnp.tensordot(x, d_y, (leading, leading), preferred_element_type=jnp.float32)
