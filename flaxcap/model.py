"""The caption decoder: additive attention over an image's grid, and a recurrent cell.

Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044), in the form of TensorFlow's tutorial "image
captioning with visual attention". Flax NNX defines and initialises it; plain JAX runs it (`model_fn`).

One cell, two drivers: training scans `Captioner.step` over given tokens, decoding over its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from flaxcap import attention, loss
from flaxcap import config as config_lib
from flaxcap.cell import Carry, Cell, Memory, unroll
from flaxcap.encoders import inception_v3

Params = dict[str, Any]


class Captioner(nnx.Module):
    """Features [I, P, F] and token ids [I, C, T] -> logits [I, C, T, V]."""

    def __init__(self, config: config_lib.Model, feature_dim: int, vocab_size: int, dtype: Any, *, rngs: nnx.Rngs):
        """`dtype`: of the arithmetic; parameters are float32."""
        c = config
        self.config = config
        self.dtype = jnp.dtype(dtype)
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.float32, "rngs": rngs}
        linear: dict[str, Any] = options | {"kernel_init": initializers.glorot_uniform()}
        self.image = nnx.Linear(feature_dim, c.image_dim, **linear)
        if c.positions:
            shape = (inception_v3.GRID**2, c.image_dim)
            self.position = nnx.Param(initializers.normal(0.5)(rngs.params(), shape, jnp.float32))
        self.key = nnx.Linear(c.image_dim, c.attention_dim, **linear)
        self.cell = Cell(c, self.dtype, rngs=rngs)
        self.embedding = nnx.Embed(vocab_size, c.embedding_dim, embedding_init=initializers.uniform(0.1), **options)
        self.word = nnx.Linear(c.embedding_dim, self.cell.gates, **linear)
        if c.initial_state == "mean":
            self.first = nnx.Linear(c.image_dim, c.hidden_dim * (2 if c.cell == "lstm" else 1), **linear)
        self.head = nnx.Linear(c.hidden_dim, c.head_dim, **linear)
        self.vocabulary = nnx.Linear(c.head_dim, vocab_size, **linear)

    def remember(self, feats_IPF: jax.Array) -> Memory:
        """The projected grid and its attention keys."""
        values_IPE = self.image(feats_IPF.astype(self.dtype))
        if self.config.positions:
            values_IPE = values_IPE + self.position[None].astype(self.dtype)
        values_IPE = jax.nn.relu(values_IPE)
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

    def read(self, tokens: jax.Array) -> jax.Array:
        """Token ids [...] -> their part of the cell's gates [..., G]."""
        return self.word(self.embedding(tokens))

    def output_weights(self) -> loss.Weights:
        """Of the two layers between hidden states and logits."""
        layers: dict[str, Any] = {"head": self.head, "vocabulary": self.vocabulary}
        return {name: {"kernel": layer.kernel[...], "bias": layer.bias[...]} for name, layer in layers.items()}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., H] -> float32 logits [..., V]."""
        return loss.logits(self.output_weights(), hidden)

    def __call__(self, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Teacher forcing: hidden states [I, C, T, H] after each given token, attention weights [I, C, T, P]."""
        memory = self.remember(feats_IPF)
        words_TICG = self.read(jnp.moveaxis(tokens_ICT, 2, 0))

        hidden, alpha = unroll(self.cell, memory, self.start(memory, tokens_ICT.shape[1]), words_TICG)
        return jnp.moveaxis(hidden, 0, 2), jnp.moveaxis(alpha, 0, 2)


def create(
    config: config_lib.Config, feature_dim: int, vocab_size: int
) -> tuple[Callable[[Params], Captioner], Callable]:
    """`bind(params) -> Captioner` for use inside a jitted function, and `init(key) -> params`, a plain dict."""

    def make(key: jax.Array) -> Captioner:
        return Captioner(config.model, feature_dim, vocab_size, config.train.dtype, rngs=nnx.Rngs(params=key))

    abstract = nnx.eval_shape(lambda: make(jax.random.key(0)))
    graph, abstract_state = nnx.split(abstract)

    def bind(params: Params) -> Captioner:
        state = jax.tree.map(lambda x: x, abstract_state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(key)))

    return bind, init
