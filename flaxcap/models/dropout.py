"""What a training step draws: masks of dropout, and hard attention's choices.

Everything is drawn image by image, from a key of its own that depends on the step and the image's place in the batch:
so it does not matter how many devices share the batch, or how a device cuts its part.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from flaxcap import config as config_lib
from flaxcap.models.cell import Noise
from flaxcap.models.recurrent import Captioner, Dropped

HARD_SHARE = 0.5  # of the images look at one place; the others keep the variance low (Xu et al. 2015, 4.1)


def dropped(model: Captioner, keys_I: jax.Array, captions: int, time: int, positions: int, config: config_lib.Dropout):
    """The masks for a batch of `len(keys_I)` images with so many captions of so many given tokens each."""
    c, d = model.config, config
    token = time, captions

    def mask(number: int, share: float, *shape: int, axis: int = 0) -> jax.Array | None:
        """Over images at `axis`; 8 random bits a number, so that shares are multiples of 1/256."""
        if not round(256 * share):
            return None
        least = round(256 * share)

        def of_image(key: jax.Array) -> jax.Array:
            # Four numbers a word: uint8 that JAX draws would cost a word each, and the words are what takes time.
            size = math.prod(shape)
            bits = jax.random.bits(jax.random.fold_in(key, number), (-(-size // 4),))
            return jax.lax.bitcast_convert_type(bits, jnp.uint8).reshape(-1)[:size].reshape(shape) >= least

        kept: Any = jax.vmap(of_image, out_axes=axis)(keys_I)
        return kept.astype(model.dtype) * (256 / (256 - least))

    gumbel_TICP = hard_I = None
    if c.attention == "hard":
        gumbel_TICP = jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, 5), (*token, positions)), out_axes=1
        )(keys_I)
        hard_I = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 6), HARD_SHARE))(keys_I)
    return Dropped(
        mask(0, d.image, positions, c.image_dim),
        mask(1, d.embedding, *token, c.embedding_dim, axis=1),
        mask(2, d.output, *token, model.states, axis=1),
        Noise(
            mask(3, d.recurrent, captions, c.hidden_dim),
            mask(4, d.attention, *token, positions, axis=1),
            gumbel_TICP,
            hard_I,
        ),
    )
