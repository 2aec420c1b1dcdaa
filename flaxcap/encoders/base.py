"""The interface of image encoders, and their registry.

An encoder is one package or file in `flaxcap/encoders/`, and one line in `_ENCODERS`.
"""

import hashlib
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import ConfigError
from flaxcap.config import Encoder as EncoderConfig
from flaxcap.errors import UserError, nearest
from flaxcap.images.preprocess import Preprocess

IMPORTED = "imported"  # the name in place of an encoder's, where the features were imported

Params = dict[str, Any]  # layers by name; each is a dict of arrays
Sample = Callable[[], np.ndarray]  # -> uint8 [I, Y, X, 3]: some images of the data set


class WeightsError(UserError):
    """Weights that cannot be read or do not fit the encoder. The message names file, layer and remedy."""


class ImageEncoder(Protocol):
    """Images -> a set of feature vectors. A class is built by `cls(config.encoder)`."""

    name: str  # such as "inception_v3-mixed10"; in the store's name, the manifest and exports
    preprocess: Preprocess
    positions: int  # P
    grid: tuple[int, int] | None  # rows and columns of the positions, in reading order; None: they have no layout
    features: int  # F
    stages: tuple[str, ...]  # where fine-tuning may begin; (): the encoder cannot be fine-tuned

    def load(self, weights: str, sample: Sample | None = None) -> tuple[Params, str]:
        """Returns parameters and their SHA-256.

        Args:
          weights: "random", a path, or a name that the encoder knows.
          sample: gives images that random weights may be scaled by.

        Raises:
          WeightsError: the weights cannot be read, or do not fit.
        """
        ...

    def abstract_params(self) -> Params:
        """Returns the shapes and dtypes of the parameters, as ShapeDtypeStructs: what an export must hold."""
        ...

    def inference_params(self, params: Params, *, platform: str, dtype: Any, many: bool) -> Params:
        """Returns parameters that `apply` is fast with: batch norm folded, kernels transformed for a CPU.

        Args:
          params: of `load`.
          platform: "cpu", "gpu" or "tpu".
          dtype: of the arithmetic.
          many: many images will be encoded, so that some seconds of compilation pay.
        """
        ...

    def split(self, params: Params, first: str) -> tuple[Params, Params]:
        """Returns two parts of the parameters: those before stage `first`, and those from `first` on.

        The first part is frozen and ready for `apply`. The second part is trained. `apply` takes `frozen | trained`.
        """
        ...

    def apply(self, params: Params, images_IYX3: jax.Array, dtype: Any) -> jax.Array:
        """Returns `feats_IPF` in `dtype`. To be called inside `jax.jit`.

        Args:
          params: of `inference_params`, or of `split`.
          images_IYX3: pixels 0 to 255, uint8 or float, of `preprocess.size` a side.
          dtype: of the arithmetic.
        """
        ...


# Imported on request.
_ENCODERS: dict[str, str | Callable[[EncoderConfig], ImageEncoder]] = {
    IMPORTED: "flaxcap.encoders.imported:ImportedFeatures",
    "inception_v3": "flaxcap.encoders.inception_v3.encoder:InceptionV3",
}


def register(name: str, encoder: Callable[[EncoderConfig], ImageEncoder]) -> None:
    """Makes an encoder available as `config.encoder.name`."""
    _ENCODERS[name] = encoder


def make(config: EncoderConfig) -> ImageEncoder:
    """Returns the encoder of a preset.

    Raises:
      ConfigError: no encoder has this name, or the encoder cannot use a field.
    """
    if config.name not in _ENCODERS:
        known = ", ".join(_ENCODERS)
        hint = nearest(config.name, list(_ENCODERS))
        raise ConfigError(f"--config.encoder.name={config.name}: expected one of {known}{hint}")
    found = _ENCODERS[config.name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    return found(config)


def normalise(images_IYX3: Any, preprocess: Preprocess, dtype: Any) -> jax.Array:
    """Returns (pixel - mean) / std, computed in float32, in `dtype`."""
    mean, std = (np.asarray(x, np.float32).reshape(1, 1, 1, 3) for x in (preprocess.mean, preprocess.std))
    return (jnp.asarray(images_IYX3, jnp.float32) / std - mean / std).astype(dtype)


def digest(params: Params) -> str:
    """Returns a SHA-256 of the names and float32 values of parameters."""
    found = hashlib.sha256()
    for name, arrays in params.items():
        for key in sorted(arrays):
            found.update(f"{name}/{key}".encode())
            found.update(np.ascontiguousarray(arrays[key], "<f4").tobytes())
    return found.hexdigest()
