"""InceptionV3 behind the encoder interface."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import ConfigError
from flaxcap.config import Encoder as EncoderConfig
from flaxcap.encoders.base import Params, Sample, normalise
from flaxcap.encoders.inception_v3 import network
from flaxcap.encoders.inception_v3 import weights as weights_lib
from flaxcap.errors import nearest
from flaxcap.images.preprocess import Preprocess

SIZE = 299  # pixels a side, as in training


class InceptionV3:
    """InceptionV3 up to a block, its grid averaged to 8x8 positions; see `base.ImageEncoder`."""

    def __init__(self, config: EncoderConfig):
        """Reads the fields `block`, `image_size` and `seed`.

        Raises:
          ConfigError: there is no such block, or images of this size give no 8x8 grid.
        """
        self.block = config.block or network.BLOCKS[-1]
        if self.block not in network.BLOCKS:
            known = ", ".join(network.BLOCKS)
            hint = nearest(self.block, list(network.BLOCKS))
            raise ConfigError(f"--config.encoder.block={config.block}: expected one of {known}{hint}")
        self.preprocess = Preprocess(config.image_size or SIZE)
        self._seed = config.seed
        size = self.preprocess.size
        try:
            network.check_size((1, size, size, 3), self.block)
        except ValueError as e:
            raise ConfigError(f"--config.encoder.image_size={size}: {e}") from e
        self.name = f"inception_v3-{self.block}"
        self.grid: tuple[int, int] | None = (network.GRID, network.GRID)
        self.positions = network.GRID**2
        self.features = network.FEATURES[self.block]
        self.stages: tuple[str, ...] = network.BLOCKS[: network.BLOCKS.index(self.block) + 1]

    def load(self, weights: str, sample: Sample | None = None) -> tuple[Params, str]:
        """Returns unfolded parameters and their SHA-256; see `weights_lib.load`."""
        return weights_lib.load(weights, block=self.block, seed=self._seed, sample=sample)

    def abstract_params(self) -> Params:
        """Returns the shapes of the unfolded parameters."""

        def array(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.dtype(np.float32))

        shapes = network.kernel_shapes(self.block)
        norm = ("beta", "mean", "var")
        return {
            name: {"kernel": array(shape)} | {key: array(shape[3:]) for key in norm} for name, shape in shapes.items()
        }

    def inference_params(self, params: Params, *, platform: str, dtype: Any, many: bool) -> Params:
        """Returns parameters with folded batch norm. For many float32 images on a CPU, kernels for Winograd."""
        folded = network.fold(params)
        return network.transform(folded) if many and platform == "cpu" and dtype == jnp.float32 else folded

    def split(self, params: Params, first: str) -> tuple[Params, Params]:
        """Returns the layers before block `first`, folded, and the others, unfolded.

        The statistics of an unfolded batch norm stay fixed; its kernels and offsets are trained.
        """
        before = set(network.kernels_before(first))
        names = list(network.kernel_shapes(self.block))
        frozen = network.fold({name: params[name] for name in names if name in before})
        return frozen, {name: params[name] for name in names if name not in before}

    def apply(self, params: Params, images_IYX3: jax.Array, dtype: Any) -> jax.Array:
        """Returns `feats_IPF`, 64 positions row by row."""
        return network.apply(params, normalise(images_IYX3, self.preprocess, dtype), block=self.block)
