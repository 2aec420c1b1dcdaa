"""The caption decoder: additive attention over an image's grid, and a recurrent cell.

Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044), in the form of TensorFlow's tutorial "image
captioning with visual attention". Flax NNX defines and initialises it; plain JAX runs it (`model_fn`).

One cell, two drivers: training scans `Captioner.step` over given tokens, decoding over its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from flaxcap import config as config_lib
from flaxcap.encoders.inception_v3 import network
from flaxcap.models import attention, output_layer
from flaxcap.models.cell import NO_NOISE, Carry, Cell, Memory, Noise, unroll
from flaxcap.models.matmul import dot_general

Params = dict[str, Any]
ENCODER = "encoder"  # of the parameters those that are trained of the encoder, which are no part of the decoder
Bind = Callable[[Params], "Captioner"]


class Dropped(NamedTuple):
    """What training hides: masks that hold 0 or 1 / (the share kept); None: nothing. See noise.py."""

    values_IPE: jax.Array | None = None
    words_TICE: jax.Array | None = None
    states_TICS: jax.Array | None = None
    cell: Noise = NO_NOISE


NOTHING_DROPPED = Dropped()


class _Bias(nnx.Module):
    """Of a vocabulary whose kernel is the embedding."""

    def __init__(self, size: int):
        self.bias = nnx.Param(jnp.zeros(size))


class Captioner(nnx.Module):
    """Features [I, P, F] and token ids [I, C, T] -> logits [I, C, T, V]."""

    def __init__(
        self,
        config: config_lib.Model,
        feature_dim: int,
        vocab_size: int,
        dtype: Any,
        matmul_dtype: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        """`dtype`: of the arithmetic, `matmul_dtype` of what its matrix products multiply; parameters are float32."""
        c = config
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.matmul_dtype = matmul_dtype or str(self.dtype)
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.float32, "rngs": rngs}
        linear: dict[str, Any] = options | {
            "kernel_init": initializers.glorot_uniform(),
            "dot_general": dot_general(self.matmul_dtype),
        }
        self.image = nnx.Linear(feature_dim, c.image_dim, **linear)
        if c.positions:
            shape = (network.GRID**2, c.image_dim)
            self.position = nnx.Param(initializers.normal(0.5)(rngs.params(), shape, jnp.float32))
        self.key = nnx.Linear(c.image_dim, c.attention_dim, **linear)
        self.cell = Cell(c, self.dtype, self.matmul_dtype, rngs=rngs)
        self.embedding = nnx.Embed(vocab_size, c.embedding_dim, embedding_init=initializers.uniform(0.1), **options)
        self.word = nnx.Linear(c.embedding_dim, self.cell.gates, **linear)
        if c.initial_state == "mean":
            self.first = nnx.Linear(c.image_dim, c.hidden_dim * (2 if c.cell == "lstm" else 1), **linear)
        self.head = nnx.Linear(self.states, c.head_dim, **linear)
        self.vocabulary = _Bias(vocab_size) if c.tied else nnx.Linear(c.head_dim, vocab_size, **linear)
        self.temperature = 1.0  # what logits are divided by

    @property
    def states(self) -> int:
        """S, the width of what the output layers take of a token."""
        c = self.config
        return c.hidden_dim + (c.image_dim + c.embedding_dim if c.output == "deep" else 0)

    def remember(self, feats_IPF: jax.Array, dropped_IPE: jax.Array | None = None) -> Memory:
        """The projected grid and its attention keys."""
        values_IPE = self.image(feats_IPF.astype(self.dtype))
        if self.config.positions:
            values_IPE = values_IPE + self.position[None].astype(self.dtype)
        values_IPE = _masked(jax.nn.relu(values_IPE), dropped_IPE)
        return Memory(values_IPE, attention.grow(self.key(values_IPE)))

    def start(self, memory: Memory, captions: int) -> Carry:
        """The state before the first token, for `captions` captions of each image."""
        c, images = self.config, memory.values_IPE.shape[0]
        if c.initial_state == "mean":
            state = jnp.tanh(self.first(memory.values_IPE.mean(1)))[:, None]
            state = jnp.broadcast_to(state, (images, captions, state.shape[-1]))
        else:
            state = jnp.zeros((images, captions, c.hidden_dim * (2 if c.cell == "lstm" else 1)), self.dtype)
        return Carry(state[..., : c.hidden_dim], state[..., c.hidden_dim :] if c.cell == "lstm" else None)

    def deep(self, hidden: jax.Array, context: jax.Array, words: jax.Array) -> jax.Array:
        """What the output layers take, [..., S]: the states, and of a deep output also what was seen and the word."""
        return jnp.concatenate([hidden, context, words], -1) if self.config.output == "deep" else hidden

    def output_weights(self) -> output_layer.Weights:
        """Of the two layers between states and logits."""
        head, vocabulary = (nnx.to_pure_dict(nnx.state(layer)) for layer in (self.head, self.vocabulary))
        if self.config.tied:
            vocabulary["kernel"] = self.embedding.embedding[...].T
        vocabulary = {name: x / self.temperature for name, x in vocabulary.items()}
        return output_layer.Weights(head, vocabulary, self.config.output == "deep", self.matmul_dtype)

    def logits(self, states: jax.Array) -> jax.Array:
        """States [..., S] -> float32 logits [..., V]."""
        return output_layer.logits(self.output_weights(), states)

    def __call__(
        self, feats_IPF: jax.Array, tokens_ICT: jax.Array, dropped: Dropped = NOTHING_DROPPED
    ) -> tuple[jax.Array, jax.Array]:
        """Teacher forcing, time first: states [T, I, C, S] after each given token, attention weights [T, I, C, P]."""
        memory = self.remember(feats_IPF, dropped.values_IPE)
        words_TICE = _masked(self.embedding(jnp.moveaxis(tokens_ICT, 2, 0)), dropped.words_TICE)
        first = self.start(memory, tokens_ICT.shape[1])
        seen = unroll(self.cell, memory, first, self.word(words_TICE), dropped.cell)
        states_TICS = self.deep(seen.hidden_TICH, seen.context_TICE, words_TICE)
        return _masked(states_TICS, dropped.states_TICS), seen.alpha_TICP


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else x * mask.astype(x.dtype)


def create(config: config_lib.Config, feature_dim: int, vocab_size: int) -> tuple[Bind, Callable]:
    """`bind(params) -> Captioner` for use inside a jitted function, and `init(key) -> params`, a plain dict."""

    def make(key: jax.Array) -> Captioner:
        dtypes = config.train.dtype, config.train.matmul_dtype
        return Captioner(config.model, feature_dim, vocab_size, *dtypes, rngs=nnx.Rngs(params=key))

    abstract = nnx.eval_shape(lambda: make(jax.random.key(0)))
    graph, abstract_state = nnx.split(abstract)

    def bind(params: Params) -> Captioner:
        state = jax.tree.map(lambda x: x, abstract_state)
        nnx.replace_by_pure_dict(state, {name: layer for name, layer in params.items() if name != ENCODER})
        return nnx.merge(graph, state)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(key)))

    return bind, init
