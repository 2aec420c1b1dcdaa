"""Cross-entropy over the vocabulary at real tokens only, with gradients computed in the forward pass.

The output layer is half of the arithmetic of a training step, and the logits are its largest array. Padding is
therefore removed before the output layer. The logits are not kept for the backward pass.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.models import output_layer
from flaxcap.models.output_layer import Weights
from flaxcap.text.vocabulary import PAD


class Sums(NamedTuple):
    """Sums over real tokens; each float32 []."""

    nats: jax.Array  # cross-entropy
    tokens: jax.Array
    right: jax.Array  # tokens whose logit is the largest


class Losses(NamedTuple):
    """The losses of some tokens. Only `objective` has gradients."""

    objective: jax.Array  # float32 []: sum of the smoothed and weighted cross-entropy
    sums: Sums
    nats_M: jax.Array  # float32: cross-entropy of each token, 0 at padding


def no_tokens() -> Sums:
    """Returns the sums over no tokens."""
    return Sums(*[jnp.zeros(())] * 3)


@jax.custom_vjp
def _pick(x_MV: jax.Array, index_M: jax.Array) -> jax.Array:
    """Returns x[m, index[m]]."""
    return jnp.take_along_axis(x_MV, index_M[:, None], 1)[:, 0]


# XLA fuses this mask with the other gradients of x. The gradient of a gather is a scatter into an array of zeros.
_pick.defvjp(
    lambda x_MV, index_M: (_pick(x_MV, index_M), (jnp.arange(x_MV.shape[1]), index_M)),
    lambda kept, d_M: (jnp.where(kept[0][None] == kept[1][:, None], d_M[:, None], 0), None),
)


def _losses(
    weights: Weights, states_MS: jax.Array, targets_M: jax.Array, weight_M: jax.Array, smoothing: float
) -> Losses:
    """Returns the losses without packing.

    Label smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7) gives the target the probability 1 - smoothing;
    all words share the rest.

    Args:
      weights: of the output layers.
      states_MS: the decoder's state before each token.
      targets_M: int32, the tokens; <pad> does not count.
      weight_M: float32, weight of each token in the objective.
      smoothing: probability that all words share.
    """
    logits_MV = output_layer.logits(weights, states_MS)
    target_M = _pick(logits_MV, targets_M)
    max_M = jax.lax.stop_gradient(logits_MV.max(-1))
    normaliser_M = jnp.log(jnp.exp(logits_MV - max_M[:, None]).sum(-1)) + max_M
    real_M = (targets_M != PAD).astype(jnp.float32)
    nats_M = (normaliser_M - target_M) * real_M
    smooth_M = nats_M
    if smoothing:
        smooth_M = nats_M + smoothing * (target_M - logits_MV.mean(-1)) * real_M
    sums = Sums(nats_M.sum(), real_M.sum(), ((target_M >= max_M) * real_M).sum())
    return Losses((smooth_M * weight_M).sum(), sums, nats_M)


# Sizes that tokens are packed to, in percent of all tokens; each is a compiled branch. Batches with several captions
# an image are 75 to 85% full; batches whose captions have one length are full.
PERCENT = 50, 65, 75, 80, 85, 100
ROWS = 64  # packed sizes are multiples


def sizes(tokens: int) -> list[int]:
    """Returns the sizes that this number of tokens may be packed to, ascending; the last is `tokens`."""
    parts = (-(-tokens * percent // 100) for percent in PERCENT)
    return sorted({min(-(-part // ROWS) * ROWS, tokens) for part in parts})


def _packed(
    function: Any, weights: Weights, states_MS: jax.Array, targets_M: jax.Array, weight_M: jax.Array
) -> tuple[Losses, Any]:
    """Calls `function(weights, states, targets, weight)` with the real tokens, packed to the smallest size that fits.

    Args:
      function: returns losses, gradients of the weights, and gradients of the packed states; the last two may be None.
      weights: of the output layers.
      states_MS: the decoder's state before each token.
      targets_M: int32, the tokens; <pad> does not count.
      weight_M: float32, weight of each token in the objective.

    Returns:
      The results of `function`, those of packed tokens unpacked again; 0 at padding.
    """
    tokens = len(targets_M)
    real_M = targets_M != PAD
    order_M = jnp.nonzero(real_M, size=tokens, fill_value=tokens)[0]

    def branch(size: int) -> Any:
        def run() -> Any:
            order = order_M[:size]

            def pack(x: jax.Array, fill: int) -> jax.Array:
                return x.at[order].get(mode="fill", fill_value=fill)

            def unpack(x: jax.Array) -> jax.Array:
                blank = jnp.zeros((tokens, *x.shape[1:]), x.dtype)
                return blank.at[order].set(x, mode="drop", unique_indices=True)

            losses, d_weights, d_states = function(weights, pack(states_MS, 0), pack(targets_M, PAD), pack(weight_M, 0))
            d_states = None if d_states is None else unpack(d_states)
            return losses._replace(nats_M=unpack(losses.nats_M)), d_weights, d_states

        return run

    *smaller, _ = sizes(tokens)
    smallest_that_fits = (real_M.sum() > jnp.array(smaller, jnp.int32)).sum()
    return jax.lax.switch(smallest_that_fits, [branch(size) for size in sizes(tokens)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_losses(
    weights: Weights,
    states_MS: jax.Array,
    targets_M: jax.Array,
    weight_M: jax.Array,
    smoothing: float = 0.0,
) -> Losses:
    """Returns the losses of tokens, given the decoder's states before them.

    Args:
      weights: of the output layers.
      states_MS: the decoder's state before each token.
      targets_M: int32, the tokens; <pad> does not count.
      weight_M: float32, weight of each token in the objective.
      smoothing: label smoothing's probability that all words share.
    """

    def run(weights: Weights, states: jax.Array, targets: jax.Array, weight: jax.Array) -> tuple:
        return _losses(weights, states, targets, weight, smoothing), None, None

    return _packed(run, weights, states_MS, targets_M, weight_M)[0]


def _forward(weights: Weights, states_MS: jax.Array, targets_M: jax.Array, weight_M: jax.Array, smoothing: float):
    def run(weights: Weights, states: jax.Array, targets: jax.Array, weight: jax.Array) -> tuple:
        def objective(weights: Weights, states: jax.Array) -> tuple[jax.Array, Losses]:
            losses = _losses(weights, states, targets, weight, smoothing)
            return losses.objective, losses

        (d_weights, d_states), losses = jax.grad(objective, (0, 1), has_aux=True)(weights, states)
        return losses, d_weights, d_states

    losses, *gradients = _packed(run, weights, states_MS, targets_M, weight_M)
    return losses, gradients


def _backward(smoothing: float, gradients: list, given: Losses) -> tuple:
    d_weights, d_states_MS = gradients
    scale = given.objective
    return jax.tree.map(lambda x: x * scale, d_weights), d_states_MS * scale.astype(d_states_MS.dtype), None, None


token_losses.defvjp(_forward, _backward)
