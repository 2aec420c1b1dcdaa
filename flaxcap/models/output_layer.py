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
    """The two layers between states and logits. After `fold` there may be one, and `head` is None."""

    head: Layer | None
    vocabulary: Layer
    tanh: bool = False  # between the two layers
    matmul_dtype: str = ""  # of the numbers that the products multiply; "": the dtype of the states


def logits(weights: Weights, states: jax.Array) -> jax.Array:
    """Returns float32 logits `[..., V]` of states `[..., S]`, computed in the states' dtype and `matmul_dtype`."""
    dtype = weights.matmul_dtype or str(states.dtype)
    if weights.head is not None:
        states = _linear(weights.head, states, dtype)
        states = jnp.tanh(states) if weights.tanh else states
    return _linear(weights.vocabulary, states, dtype).astype(jnp.float32)


def _linear(layer: Layer, x: jax.Array, dtype: str) -> jax.Array:
    y = matmul.product(x, layer["kernel"], dtype)
    return y + layer["bias"].astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)


def fold(weights: Weights) -> Weights:
    """Returns the same function as one layer, if no tanh stands between the two."""
    head, vocabulary = weights.head, weights.vocabulary
    if head is None or weights.tanh:
        return weights
    multiply = functools.partial(jnp.matmul, precision="highest")
    folded = {
        "kernel": multiply(head["kernel"], vocabulary["kernel"]),
        "bias": multiply(head["bias"], vocabulary["kernel"]) + vocabulary["bias"],
    }
    return dataclasses.replace(weights, head=None, vocabulary=folded)


def pad(weights: Weights, multiple: int) -> Weights:
    """Returns weights for a multiple of so many words. The added words have logits of -inf."""
    lacking = -len(weights.vocabulary["bias"]) % multiple
    vocabulary = {
        "kernel": jnp.pad(weights.vocabulary["kernel"], ((0, 0), (0, lacking))),
        "bias": jnp.pad(weights.vocabulary["bias"], (0, lacking), constant_values=-jnp.inf),
    }
    return dataclasses.replace(weights, vocabulary=vocabulary)


def exclude(weights: Weights, ids: slice) -> Weights:
    """Returns weights that give these token ids no probability."""
    vocabulary = weights.vocabulary
    return dataclasses.replace(weights, vocabulary=vocabulary | {"bias": vocabulary["bias"].at[ids].set(-1e9)})


def divide(weights: Weights, temperature: float) -> Weights:
    """Returns weights whose logits are divided by a temperature."""
    vocabulary = {name: x / temperature for name, x in weights.vocabulary.items()}
    return dataclasses.replace(weights, vocabulary=vocabulary)
