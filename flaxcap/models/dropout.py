"""Dropout masks, drawn image by image.

Each image has a key of its own, which depends on the step and on the image's index in the batch. So the masks do not
depend on the number of devices, or on the size of a microbatch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def mask(
    keys_I: jax.Array, number: int, share: float, shape: tuple[int, ...], dtype: Any, axis: int = 0
) -> jax.Array | None:
    """Returns a mask of 0 and 1 / (1 - share), or None if the share is 0.

    Args:
      keys_I: a PRNG key for each image.
      number: what to fold into the keys: different masks of a step have different numbers.
      share: of the entries that are 0, rounded to a multiple of 1/256.
      shape: of one image's mask.
      dtype: of the mask.
      axis: where the axis of the images is inserted.
    """
    least = round(256 * share)
    if not least:
        return None

    def of_image(key: jax.Array) -> jax.Array:
        # jax.random.bits(dtype=uint8) draws 32 bits for each entry (jax 0.10): four entries share a word here.
        size = math.prod(shape)
        bits = jax.random.bits(jax.random.fold_in(key, number), (-(-size // 4),))
        return jax.lax.bitcast_convert_type(bits, jnp.uint8).reshape(-1)[:size].reshape(shape) >= least

    kept: Any = jax.vmap(of_image, out_axes=axis)(keys_I)
    return kept.astype(dtype) * (256 / (256 - least))


def apply(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns x, multiplied by the mask if there is one."""
    return x if mask is None else x * mask.astype(x.dtype)
