"""Fine-tuning: the encoder's last blocks are trained with the decoder, on pictures in the place of features.

Batch norm stays unfolded there, its statistics fixed; kernels and offsets are trained. The blocks before stay as they
are, folded. Pictures are flipped and cropped at random, on the device, each by a key of its own.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap import config as config_lib
from flaxcap.encoders.inception_v3 import network
from flaxcap.images import decode
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

    def __init__(self, load: Callable[[int], bytes], count: int, size: int):
        """`load(row)`: the bytes of a picture."""
        self.shape, self.dtype = (count, size, size, 3), np.dtype(np.uint8)
        self._load, self._pool = load, ThreadPoolExecutor(os.cpu_count(), "pictures")

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [len(rows), size, size, 3]. ImageError for a picture that cannot be read."""
        return np.stack(list(self._pool.map(lambda row: decode.to_square(self._load(int(row)), self.shape[1]), rows)))


def split(encoder: network.Params, first: str, last: str) -> tuple[network.Params, network.Params]:
    """Unfolded parameters -> those before block `first`, folded, and those from there up to `last`, unfolded."""
    kept = set(network.kernels_before(first))
    names = list(network.kernel_shapes(last))
    frozen = network.fold({name: encoder[name] for name in names if name in kept})
    return frozen, {name: encoder[name] for name in names if name not in kept}


def make_encode(config: config_lib.Encoder, options: config_lib.Finetune) -> Encode:
    """`encode(params, frozen, images_IYX3, keys_I) -> feats_IPF`; no keys: the pictures as they are.

    `params` of the whole model, whose `encoder` is trained.
    """
    dtype = jnp.dtype(config.dtype)

    def encode(params: Params, frozen: Params, images_IYX3: jax.Array, keys_I: jax.Array | None) -> jax.Array:
        if keys_I is not None:
            images_IYX3 = jax.vmap(lambda image, key: augment(image, key, options))(images_IYX3, keys_I)
        return network.apply(frozen | params[ENCODER], images_IYX3, block=config.block, dtype=dtype)

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


def whole(encoder: network.Params, params: Params) -> tuple[network.Params, Params]:
    """The unfolded encoder with what was trained of it, and the decoder's own parameters."""
    trained: Any = params.get(ENCODER, {})
    merged = {name: dict(trained.get(name, layer)) for name, layer in encoder.items()}
    return merged, dict(itertools.filterfalse(lambda item: item[0] == ENCODER, params.items()))
