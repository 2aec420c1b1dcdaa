"""Cross-entropy over the vocabulary, at real tokens only, with its gradients computed on the way forward.

The vocabulary's product is half the arithmetic of a training step, and its logits the largest array that is left
once attention keeps nothing: padding must not enter it, and nothing of it should outlive it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.text import PAD

Weights = dict[str, dict[str, jax.Array]]  # {"head": {"kernel", "bias"}, "vocabulary": {"kernel", "bias"}}


class Sums(NamedTuple):
    """Over the tokens that count; each float32 []."""

    nats: jax.Array  # cross-entropy
    tokens: jax.Array
    right: jax.Array  # tokens that the model finds most likely


def no_tokens() -> Sums:
    return Sums(*[jnp.zeros(())] * 3)


def logits(weights: Weights, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., H] -> float32 logits [..., V]: two linear layers, computed in the states' dtype."""
    for name in ("head", "vocabulary"):
        layer = weights[name]
        bias = layer["bias"].astype(hidden.dtype).reshape(*[1] * (hidden.ndim - 1), -1)
        hidden = hidden @ layer["kernel"].astype(hidden.dtype) + bias
    return hidden.astype(jnp.float32)


def _sums(weights: Weights, hidden_NH: jax.Array, targets_N: jax.Array) -> Sums:
    """The plain computation, <pad> left out."""
    logits_NV = logits(weights, hidden_NH)
    target_NV = jnp.arange(logits_NV.shape[-1])[None] == targets_N[:, None]
    # Picked by a mask: a gather's gradient would be scattered into an array of zeros.
    target_N = jnp.where(target_NV, logits_NV, 0).sum(-1)
    max_N = jax.lax.stop_gradient(logits_NV.max(-1))
    nats_N = jnp.log(jnp.exp(logits_NV - max_N[:, None]).sum(-1)) + max_N - target_N
    real_N = (targets_N != PAD).astype(jnp.float32)
    return Sums((nats_N * real_N).sum(), real_N.sum(), ((target_N >= max_N) * real_N).sum())


SIZES, ROWS = 5, 64


def sizes(places: int) -> list[int]:
    """What so many places may be packed to: from half of them to all, in whole blocks of rows."""
    parts = (-(-places * k // (2 * SIZES)) for k in range(SIZES, 2 * SIZES + 1))
    return sorted({min(-(-part // ROWS) * ROWS, places) for part in parts})


def _packed(function: Any, weights: Weights, hidden_NH: jax.Array, targets_N: jax.Array) -> Any:
    """`function(weights, hidden, targets)` of the real tokens alone, packed to the least size that holds them."""
    places = len(targets_N)
    real_N = targets_N != PAD
    order_N = jnp.nonzero(real_N, size=places, fill_value=places)[0]

    def branch(size: int) -> Any:
        def run() -> Any:
            order = order_N[:size]
            hidden = hidden_NH.at[order].get(mode="fill", fill_value=0)
            targets = targets_N.at[order].get(mode="fill", fill_value=PAD)
            return function(weights, hidden, targets, order)

        return run

    *smaller, _ = sizes(places)
    smallest_that_holds = (real_N.sum() > jnp.array(smaller, jnp.int32)).sum()
    return jax.lax.switch(smallest_that_holds, [branch(size) for size in sizes(places)])


@jax.custom_vjp
def token_losses(weights: Weights, hidden_NH: jax.Array, targets_N: jax.Array) -> Sums:
    """What `hidden_NH` makes of the tokens `targets_N` that follow; <pad> does not count. Only `nats` has gradients."""
    return _packed(lambda w, h, t, _: _sums(w, h, t), weights, hidden_NH, targets_N)


def _forward(weights: Weights, hidden_NH: jax.Array, targets_N: jax.Array) -> tuple[Sums, tuple]:
    def run(weights: Weights, hidden: jax.Array, targets: jax.Array, order: jax.Array) -> tuple:
        def nats(weights: Weights, hidden: jax.Array) -> tuple[jax.Array, Sums]:
            sums = _sums(weights, hidden, targets)
            return sums.nats, sums

        (d_weights, d_hidden), sums = jax.grad(nats, (0, 1), has_aux=True)(weights, hidden)
        d_hidden_NH = jnp.zeros_like(hidden_NH).at[order].set(d_hidden, mode="drop", unique_indices=True)
        return sums, (d_weights, d_hidden_NH)

    return _packed(run, weights, hidden_NH, targets_N)


def _backward(gradients: tuple, given: Sums) -> tuple:
    d_weights, d_hidden_NH = gradients
    scale = given.nats
    return jax.tree.map(lambda x: x * scale, d_weights), d_hidden_NH * scale.astype(d_hidden_NH.dtype), None


token_losses.defvjp(_forward, _backward)
