"""The place of an encoder that flaxcap does not have: its features were imported as maps, see features/npy_maps.py."""

from typing import Any, NoReturn

import jax

from flaxcap.config import Encoder as EncoderConfig
from flaxcap.encoders.base import IMPORTED, Params, Sample, WeightsError
from flaxcap.images.preprocess import Preprocess


class ImportedFeatures:
    """An encoder that encodes nothing. The store knows the sizes of the features."""

    name = IMPORTED
    preprocess = Preprocess(size=256)  # of images in plots
    positions = 0
    grid = None
    features = 0
    stages = ()

    def __init__(self, config: EncoderConfig):
        del config

    def load(self, weights: str, sample: Sample | None = None) -> tuple[Params, str]:
        self._refuse()

    def abstract_params(self) -> Params:
        self._refuse()

    def inference_params(self, params: Params, *, platform: str, dtype: Any, many: bool) -> Params:
        self._refuse()

    def split(self, params: Params, first: str) -> tuple[Params, Params]:
        self._refuse()

    def apply(self, params: Params, images_IYX3: jax.Array, dtype: Any) -> jax.Array:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise WeightsError(
            f"--config.encoder.name={IMPORTED}: found no network, expected maps of features; give --npy_dir=DIR"
        )
