"""Fine-tuning: the encoder's last blocks are trained with the decoder, on pictures in the place of features.

Batch norm stays unfolded there, its statistics fixed; kernels and offsets are trained. The blocks before stay as they
are, folded. Pictures are flipped and cropped at random, on the device, each by a key of its own.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap import config as config_lib
from flaxcap.encoders.base import ImageEncoder
from flaxcap.encoders.base import Params as EncoderParams
from flaxcap.images import decode
from flaxcap.images.preprocess import Preprocess
from flaxcap.input_pipeline.device_feed import Source
from flaxcap.models.decoder import ENCODER, Params

Encode = Callable[[Params, Params, jax.Array, jax.Array | None], jax.Array]


class Stage(NamedTuple):
    """What a run trains from: features, or pictures with a part of the encoder, see finetune.py."""

    sources: Mapping[str, Source]  # by role; none: a split's features
    frozen: Any  # of `Inputs`
    trained: Params  # beside the decoder's
    encode: Callable | None


FEATURES = Stage({}, None, {}, None)


class Pictures:
    """A split's pictures as the encoder takes them; a `feed.Source`."""

    def __init__(self, load: Callable[[int], bytes], count: int, preprocess: Preprocess):
        """`load(row)`: the bytes of a picture."""
        self._preprocess, size = preprocess, preprocess.size
        self.shape, self.dtype = (count, size, size, 3), np.dtype(np.uint8)
        self._load, self._pool = load, ThreadPoolExecutor(os.cpu_count(), "pictures")

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [len(rows), size, size, 3]. ImageError for a picture that cannot be read."""
        pixels = self._pool.map(lambda row: decode.for_encoder(self._load(int(row)), self._preprocess), rows)
        return np.stack(list(pixels))


def make_encode(encoder: ImageEncoder, config: config_lib.Encoder, options: config_lib.Finetune) -> Encode:
    """Returns `encode(params, frozen, images_IYX3, keys_I) -> feats_IPF`. Without keys the images are not augmented.

    `params` holds the trained layers under `ENCODER`, `frozen` those before.
    """
    dtype = jnp.dtype(config.dtype)

    def encode(params: Params, frozen: Params, images_IYX3: jax.Array, keys_I: jax.Array | None) -> jax.Array:
        if keys_I is not None:
            images_IYX3 = jax.vmap(lambda image, key: augment(image, key, options))(images_IYX3, keys_I)
        return encoder.apply(frozen | params[ENCODER], images_IYX3, dtype)

    return encode


def augment(image_YX3: jax.Array, key: jax.Array, options: config_lib.Finetune) -> jax.Array:
    """A random square part of the picture, at its whole size again, and in half of all cases mirrored; float32."""
    crop_key, place_key, flip_key = jax.random.split(key, 3)
    size = image_YX3.shape[0]
    part = jax.random.uniform(crop_key, minval=options.crop, maxval=1.0)
    corner_2 = jax.random.uniform(place_key, (2,)) * (1 - part) * size
    scale = 1 / part
    image = jax.image.scale_and_translate(
        image_YX3.astype(jnp.float32), (size, size, 3), (0, 1), scale[None].repeat(2), -corner_2 * scale, "linear"
    )
    mirrored = options.flip & jax.random.bernoulli(flip_key)
    return jnp.where(mirrored, image[:, ::-1], image)


def merge(encoder: EncoderParams, params: Params) -> tuple[EncoderParams, Params]:
    """Returns the encoder with its trained layers, and the decoder's own parameters."""
    trained: Any = params.get(ENCODER, {})
    merged = {name: dict(trained.get(name, layer)) for name, layer in encoder.items()}
    return merged, {name: layer for name, layer in params.items() if name != ENCODER}
