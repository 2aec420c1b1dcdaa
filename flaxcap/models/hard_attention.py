"""Hard attention: one position is drawn for each token, and learned by REINFORCE (Xu et al. 2015, section 4.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.config import Train

HARD_SHARE = 0.5  # of the images draw a position; the others use the weighted sum, against variance (Xu et al., 4.1)


class Draws(NamedTuple):
    """Random numbers of hard attention."""

    gumbel_TICP: jax.Array  # Gumbel noise, which draws a position
    hard_I: jax.Array  # bool: the images that draw a position


def draw(keys_I: jax.Array, time: int, captions: int, positions: int) -> Draws:
    """Returns the random numbers of a step."""

    def gumbel(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, 5), (time, captions, positions))

    hard_I = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 6), HARD_SHARE))(keys_I)
    return Draws(jax.vmap(gumbel, out_axes=1)(keys_I), hard_I)


def choose(alpha: jax.Array, gumbel: jax.Array) -> jax.Array:
    """Returns one-hot vectors `[..., P]`: positions drawn with the probabilities alpha (Gumbel 1954)."""
    best = jnp.argmax(jnp.log(alpha) + gumbel, -1)
    return jax.nn.one_hot(best, alpha.shape[-1], dtype=alpha.dtype)


def weights(alpha_ICP: jax.Array, gumbel_ICP: jax.Array, hard_I: jax.Array) -> jax.Array:
    """Returns the one-hot choices of the images in `hard_I`, and the attention weights of the others."""
    chosen_ICP = jax.lax.stop_gradient(choose(alpha_ICP, gumbel_ICP))
    return jnp.where(hard_I[:, None, None], chosen_ICP, alpha_ICP)


def loss(
    draws: Draws,
    alpha_TICP: jax.Array,
    nats_TIC: jax.Array,
    real_TIC: jax.Array,
    baseline: jax.Array,
    config: Train,
) -> jax.Array:
    """Returns the REINFORCE term and the entropy term, summed over captions (Xu et al. 2015, equation 11).

    The reward of the drawn positions is the log-probability of the caption above the baseline.

    Args:
      draws: the random numbers of the step.
      alpha_TICP: attention weights.
      nats_TIC: cross-entropy of each token.
      real_TIC: 1 where a token is real, 0 at padding.
      baseline: float32 [], in nats.
      config: `hard_reward` and `hard_entropy` weigh the two terms.
    """
    chosen_TICP = jax.lax.stop_gradient(choose(alpha_TICP, draws.gumbel_TICP))
    log_alpha_TICP = jnp.log(jnp.maximum(alpha_TICP, 1e-20))
    log_chosen_IC = ((chosen_TICP * log_alpha_TICP).sum(-1) * real_TIC).sum(0)
    reward_IC = -nats_TIC.sum(0) - baseline
    reward_IC = jax.lax.stop_gradient(reward_IC) * draws.hard_I[:, None] * real_TIC[0]
    entropy = -((alpha_TICP * log_alpha_TICP).sum(-1) * real_TIC).sum()
    return -config.hard_reward * (reward_IC * log_chosen_IC).sum() - config.hard_entropy * entropy
