"""Fine-tuning: the last stages of the encoder are trained with the decoder, on images in place of stored features.

The stages before them are frozen. The encoder's `split` says which parameters are trained. Images are cropped and
mirrored at random on the device, each by a PRNG key of its own.
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


class TrainingSource(NamedTuple):
    """The source of a run's features: a store, or images and an encoder that is trained."""

    sources: Mapping[str, Source]  # images of the splits, by role; {}: features of the store
    frozen: Any  # the encoder's frozen parameters, see `Inputs`
    trained: Params  # the encoder's trained parameters, under `ENCODER`; {}: none
    encode: Encode | None  # None: the sources are features


FROM_STORE = TrainingSource({}, None, {}, None)


class ImageSource:
    """The images of a split at the encoder's size; a `Source` of the feed."""

    def __init__(self, load: Callable[[int], bytes], count: int, preprocess: Preprocess):
        """Reads nothing yet.

        Args:
          load: `load(row)` returns the encoded image of a row.
          count: images of the split.
          preprocess: of the encoder.
        """
        self._preprocess, size = preprocess, preprocess.size
        self.shape, self.dtype = (count, size, size, 3), np.dtype(np.uint8)
        self._load, self._pool = load, ThreadPoolExecutor(os.cpu_count(), "images")

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns images, uint8 [len(rows), size, size, 3].

        Raises:
          ImageError: an image cannot be read.
        """
        pixels = self._pool.map(lambda row: decode.for_encoder(self._load(int(row)), self._preprocess), rows)
        return np.stack(list(pixels))


def make_encode(encoder: ImageEncoder, config: config_lib.Encoder, options: config_lib.Finetune) -> Encode:
    """Returns `encode(params, frozen, images_IYX3, keys_I) -> feats_IPF`. Without keys the images are not augmented.

    `params` holds the trained layers under `ENCODER`, `frozen` holds the layers before them.

    Args:
      encoder: the image encoder.
      config: dtype of its arithmetic.
      options: of the augmentation.
    """
    dtype = jnp.dtype(config.dtype)

    def encode(params: Params, frozen: Params, images_IYX3: jax.Array, keys_I: jax.Array | None) -> jax.Array:
        if keys_I is not None:
            images_IYX3 = jax.vmap(lambda image, key: augment(image, key, options))(images_IYX3, keys_I)
        return encoder.apply(frozen | params[ENCODER], images_IYX3, dtype)

    return encode


def augment(image_YX3: jax.Array, key: jax.Array, options: config_lib.Finetune) -> jax.Array:
    """Returns a random square crop, float32, resized to the size of the image and mirrored with probability 1/2.

    Args:
      image_YX3: pixels of a square image.
      key: PRNG key of the image.
      options: `crop` is the smallest side of the crop, as a share of the image's; `flip` allows mirroring.
    """
    crop_key, corner_key, flip_key = jax.random.split(key, 3)
    size = image_YX3.shape[0]
    share = jax.random.uniform(crop_key, minval=options.crop, maxval=1.0)
    corner_2 = jax.random.uniform(corner_key, (2,)) * (1 - share) * size
    scale = 1 / share
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
