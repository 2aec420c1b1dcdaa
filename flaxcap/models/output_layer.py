"""The output layers: from a decoder's states to logits over the vocabulary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from flaxcap.models import matmul

Layer = dict[str, jax.Array]  # {"kernel", "bias"}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("head", "vocabulary"), meta_fields=("tanh", "matmul_dtype")
)
@dataclasses.dataclass(frozen=True)
class Weights:
    """Of the two layers between a decoder's states and its logits; once folded they may be one, and `head` None."""

    head: Layer | None
    vocabulary: Layer
    tanh: bool = False  # between the two
    matmul_dtype: str = ""  # of the numbers that products multiply; "": as the states


def fold(weights: Weights) -> Weights:
    """The same function with one layer, where nothing stands between the two."""
    head, vocabulary = weights.head, weights.vocabulary
    if head is None or weights.tanh:
        return weights
    multiply = functools.partial(jnp.matmul, precision="highest")
    folded = {
        "kernel": multiply(head["kernel"], vocabulary["kernel"]),
        "bias": multiply(head["bias"], vocabulary["kernel"]) + vocabulary["bias"],
    }
    return dataclasses.replace(weights, head=None, vocabulary=folded)


def logits(weights: Weights, states: jax.Array) -> jax.Array:
    """Decoder states [..., S] -> float32 logits [..., V], in the states' dtype and `matmul_dtype`."""
    dtype = weights.matmul_dtype or str(states.dtype)
    if weights.head is not None:
        states = _linear(weights.head, states, dtype)
        states = jnp.tanh(states) if weights.tanh else states
    return _linear(weights.vocabulary, states, dtype).astype(jnp.float32)


def _linear(layer: Layer, x: jax.Array, dtype: str) -> jax.Array:
    y = matmul.product(x, layer["kernel"], dtype)
    return y + layer["bias"].astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)
