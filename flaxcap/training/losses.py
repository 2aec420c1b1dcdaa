"""Cross-entropy over the vocabulary, at real tokens only, with its gradients computed on the way forward.

The vocabulary's product is half the arithmetic of a training step, and its logits the largest array that is left
once attention keeps nothing: padding must not enter it, and nothing of it should outlive it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.models import output_layer
from flaxcap.models.output_layer import Weights
from flaxcap.text.vocabulary import PAD


class Sums(NamedTuple):
    """Over the tokens that count; each float32 []."""

    nats: jax.Array  # cross-entropy
    tokens: jax.Array
    right: jax.Array  # tokens that the model finds most likely


class Losses(NamedTuple):
    """Of given tokens. Only `objective` has gradients."""

    objective: jax.Array  # float32 []: the tokens' cross-entropy, smoothed and weighted, summed
    sums: Sums
    nats_M: jax.Array  # float32: the plain cross-entropy of each token, 0 at <pad>


def no_tokens() -> Sums:
    return Sums(*[jnp.zeros(())] * 3)


@jax.custom_vjp
def _pick(x_MV: jax.Array, index_M: jax.Array) -> jax.Array:
    """x[n, index[n]]."""
    return jnp.take_along_axis(x_MV, index_M[:, None], 1)[:, 0]


# A mask, which is one with the other gradients of x; a gather's own would be scattered into an array of zeros.
_pick.defvjp(
    lambda x_MV, index_M: (_pick(x_MV, index_M), (jnp.arange(x_MV.shape[1]), index_M)),
    lambda kept, d_M: (jnp.where(kept[0][None] == kept[1][:, None], d_M[:, None], 0), None),
)


def _losses(
    weights: Weights, states_MS: jax.Array, targets_M: jax.Array, weight_M: jax.Array, smoothing: float
) -> Losses:
    """The plain computation, <pad> left out.

    Label smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7): the target has the probability 1 - smoothing,
    and all words share the rest.
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


# Each size is compiled. Captions of one image fill 75 to 85% of their places, those of a length all.
PERCENT, ROWS = (50, 65, 75, 80, 85, 100), 64


def sizes(places: int) -> list[int]:
    """What so many places may be packed to, in whole blocks of rows."""
    parts = (-(-places * percent // 100) for percent in PERCENT)
    return sorted({min(-(-part // ROWS) * ROWS, places) for part in parts})


def _packed(
    function: Any, weights: Weights, states_MS: jax.Array, targets_M: jax.Array, weight_M: jax.Array
) -> tuple[Losses, Any]:
    """`function(weights, states, targets, weight)` of the real tokens alone, packed to the least size that holds them.

    It gives losses, and by how many more arrays of packed tokens, which are laid out again over all the places.
    """
    places = len(targets_M)
    real_M = targets_M != PAD
    order_M = jnp.nonzero(real_M, size=places, fill_value=places)[0]

    def branch(size: int) -> Any:
        def run() -> Any:
            order = order_M[:size]

            def pack(x: jax.Array, fill: int) -> jax.Array:
                return x.at[order].get(mode="fill", fill_value=fill)

            def unpack(x: jax.Array) -> jax.Array:
                blank = jnp.zeros((places, *x.shape[1:]), x.dtype)
                return blank.at[order].set(x, mode="drop", unique_indices=True)

            losses, d_weights, d_states = function(weights, pack(states_MS, 0), pack(targets_M, PAD), pack(weight_M, 0))
            d_states = None if d_states is None else unpack(d_states)
            return losses._replace(nats_M=unpack(losses.nats_M)), d_weights, d_states

        return run

    *smaller, _ = sizes(places)
    smallest_that_holds = (real_M.sum() > jnp.array(smaller, jnp.int32)).sum()
    return jax.lax.switch(smallest_that_holds, [branch(size) for size in sizes(places)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_losses(
    weights: Weights,
    states_MS: jax.Array,
    targets_M: jax.Array,
    weight_M: jax.Array,
    smoothing: float = 0.0,
) -> Losses:
    """What `states_MS` makes of the tokens `targets_M` that follow; <pad> does not count.

    `weight_M`, float32: of each token in the objective. `smoothing`: label smoothing's share.
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
