"""The interface of caption decoders, and their registry.

Training, decoding and benchmarks know a decoder only as a `CaptionDecoder`. Flax NNX defines and initialises its
parameters; plain JAX functions run it, through `bind`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from flaxcap.config import Config, ConfigError
from flaxcap.config import Dropout as DropoutConfig
from flaxcap.config import Model as ModelConfig
from flaxcap.config import Train as TrainConfig
from flaxcap.errors import nearest
from flaxcap.models.output_layer import Weights

Params = dict[str, Any]
ENCODER = "encoder"  # the key of the encoder's trained parameters, which belong to no decoder
Bind = Callable[[Params], "CaptionDecoder"]


class Sizes(NamedTuple):
    """The sizes that the data give a decoder."""

    positions: int  # P
    features: int  # F
    vocabulary: int  # V
    positions_vary: bool = False  # unused positions of an image are NaN


class CaptionDecoder(Protocol):
    """Image features and tokens -> states, attention weights and output weights.

    Memories, carries and noises are pytrees of the decoder's own. Every leaf of a memory is `[I, ...]`, every leaf of
    a carry `[I, K, ...]`. A class is built by `cls(config.model, sizes, dtype, matmul_dtype, rngs=rngs)`.
    """

    sizes: Sizes
    dtype: np.dtype  # of the arithmetic; parameters are float32
    matmul_dtype: str  # of the numbers that matrix products multiply

    def remember(self, feats_IPF: jax.Array) -> Any:
        """Returns the memory of images: what all their captions share."""
        ...

    def start(self, memory: Any, captions: int, length: int) -> Any:
        """Returns the carry before the first token, for `captions` captions an image of at most `length` tokens."""
        ...

    def tables(self) -> Any:
        """Returns what `step` computes once for all images, any pytree."""
        ...

    def step(
        self, tables: Any, memory: Any, carry: Any, tokens_IK: jax.Array, t: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Returns the next carry, `states_IKS` and `alpha_IKP` (float32) after token number `t` of each caption."""
        ...

    def __call__(self, feats_IPF: jax.Array, tokens_ICT: jax.Array, noise: Any = None) -> tuple[jax.Array, jax.Array]:
        """Returns `states_TICS` and `alpha_TICP` after each given token (teacher forcing). `noise`: of `draw_noise`."""
        ...

    def output_weights(self) -> Weights:
        """Returns the layers between states and logits."""
        ...

    def draw_noise(self, keys_I: jax.Array, captions: int, time: int, dropout: DropoutConfig) -> Any:
        """Returns what a training step draws for `captions` captions of `time` tokens of each image."""
        ...

    def auxiliary_loss(
        self,
        noise: Any,
        alpha_TICP: jax.Array,
        nats_TIC: jax.Array,
        real_TIC: jax.Array,
        baseline: jax.Array,
        config: TrainConfig,
    ) -> jax.Array | float:
        """Returns what the decoder adds to the summed cross-entropy of a microbatch.

        Args:
          noise: what `draw_noise` gave for the step.
          alpha_TICP: attention weights.
          nats_TIC: the cross-entropy of each token.
          real_TIC: 1 where a token is real, 0 at padding.
          baseline: float32 [], the moving average of a caption's log-probability, in nats.
          config: the weights of the additional terms.
        """
        ...

    @staticmethod
    def with_word_vectors(params: Params, vectors: dict[int, np.ndarray]) -> Params:
        """Returns the parameters with the embeddings of these token ids replaced."""
        ...

    @staticmethod
    def flops(config: ModelConfig, *, images: int, tokens: int, positions: int, features: int, vocabulary: int) -> int:
        """Returns the floating-point operations of the matrix products of a forward pass, at real tokens."""
        ...


# Imported on request.
_DECODERS: dict[str, str | type] = {"recurrent": "flaxcap.models.recurrent:RecurrentDecoder"}


def register(name: str, decoder: type) -> None:
    """Makes a decoder class available as `config.model.name`."""
    _DECODERS[name] = decoder


def find(name: str) -> Any:
    """Returns the decoder class of this name.

    Raises:
      ConfigError: no decoder has this name.
    """
    if name not in _DECODERS:
        known = ", ".join(_DECODERS)
        raise ConfigError(f"--config.model.name={name}: expected one of {known}{nearest(name, list(_DECODERS))}")
    found = _DECODERS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    return found


def create(config: Config, sizes: Sizes) -> tuple[Bind, Callable[[jax.Array], Params]]:
    """Returns `bind(params) -> CaptionDecoder`, for use inside a jitted function, and `init(key) -> params`."""
    decoder = find(config.model.name)

    def make(key: jax.Array) -> CaptionDecoder:
        dtypes = config.train.dtype, config.train.matmul_dtype
        return decoder(config.model, sizes, *dtypes, rngs=nnx.Rngs(params=key))

    abstract = nnx.eval_shape(lambda: make(jax.random.key(0)))
    graph, abstract_state = nnx.split(abstract)

    def bind(params: Params) -> CaptionDecoder:
        state = jax.tree.map(lambda x: x, abstract_state)
        nnx.replace_by_pure_dict(state, {name: layer for name, layer in params.items() if name != ENCODER})
        return nnx.merge(graph, state)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(key)))

    return bind, init


class _WithOutput:
    """A decoder whose output weights are changed."""

    def __init__(self, decoder: CaptionDecoder, change: Callable[[Weights], Weights]):
        self._decoder, self._change = decoder, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def __call__(self, *args: Any) -> tuple[jax.Array, jax.Array]:
        return self._decoder(*args)

    def output_weights(self) -> Weights:
        return self._change(self._decoder.output_weights())


def with_output(bind: Bind, change: Callable[[Weights], Weights]) -> Bind:
    """Returns a bind of decoders whose output weights pass through `change`."""

    def bound(params: Params) -> Any:
        return _WithOutput(bind(params), change)

    return bound
