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
from flaxcap.encoders import inception_v3

Params = dict[str, Any]


class Memory(NamedTuple):
    """What the decoder looks at: computed once an image, whatever the number of its captions."""

    values_IPE: jax.Array
    keys_IPA: jax.Array


class Carry(NamedTuple):
    """The recurrent state; `cell_ICH` is None for a GRU."""

    hidden_ICH: jax.Array
    cell_ICH: jax.Array | None


def _recurrent_init(attention_dim: int, hidden_dim: int) -> Callable:
    """The query's columns Glorot-uniform, each gate's columns orthogonal, as Keras initialises them apart."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        gates = (shape[1] - attention_dim) // hidden_dim
        keys = jax.random.split(key, gates + 1)
        query = initializers.glorot_uniform()(keys[0], (hidden_dim, attention_dim), dtype)
        square = initializers.orthogonal()
        return jnp.concatenate([query, *(square(k, (hidden_dim, hidden_dim), dtype) for k in keys[1:])], 1)

    return init


class Captioner(nnx.Module):
    """Features [I, P, F] and token ids [I, C, T] -> logits [I, C, T, V]."""

    def __init__(self, config: config_lib.Model, feature_dim: int, vocab_size: int, dtype: Any, *, rngs: nnx.Rngs):
        """`dtype`: of the arithmetic; parameters are float32."""
        c = config
        self.config = config
        self.dtype = jnp.dtype(dtype)
        gates = {"gru": 3, "lstm": 4}[c.cell] * c.hidden_dim
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.float32, "rngs": rngs}
        linear: dict[str, Any] = options | {"kernel_init": initializers.glorot_uniform()}
        self.image = nnx.Linear(feature_dim, c.image_dim, **linear)
        if c.positions:
            shape = (inception_v3.GRID**2, c.image_dim)
            self.position = nnx.Param(initializers.normal(0.5)(rngs.params(), shape, jnp.float32))
        self.key = nnx.Linear(c.image_dim, c.attention_dim, **linear)
        self.score = nnx.Linear(c.attention_dim, 1, use_bias=False, **linear)
        self.embedding = nnx.Embed(vocab_size, c.embedding_dim, embedding_init=initializers.uniform(0.1), **options)
        self.word = nnx.Linear(c.embedding_dim, gates, **linear)
        self.context = nnx.Linear(c.image_dim, gates, use_bias=False, **linear)
        # One product gives the attention's query and the gates' recurrent part.
        self.recurrent = nnx.Linear(
            c.hidden_dim,
            c.attention_dim + gates,
            kernel_init=_recurrent_init(c.attention_dim, c.hidden_dim),
            **options,
        )
        if c.attention_gate:
            self.gate = nnx.Linear(c.hidden_dim, 1, **linear)
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
        return Memory(values_IPE, self.key(values_IPE))

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

    def attend(self, memory: Memory, query_ICA: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Additive attention (Bahdanau et al. 2015, arXiv:1409.0473): context [I, C, E], weights [I, C, P] float32."""
        energy_ICPA = jnp.tanh(memory.keys_IPA[:, None] + query_ICA[:, :, None])
        scores_ICP = self.score(energy_ICPA)[..., 0].astype(jnp.float32)
        alpha_ICP = jax.nn.softmax(scores_ICP)
        return jnp.einsum("icp,ipe->ice", alpha_ICP.astype(self.dtype), memory.values_IPE), alpha_ICP

    def step(self, memory: Memory, carry: Carry, word_ICG: jax.Array) -> tuple[Carry, jax.Array]:
        """One token: the next state, and where the model looked for it, `alpha_ICP`."""
        c = self.config
        hidden_ICH = carry.hidden_ICH
        mixed = self.recurrent(hidden_ICH)
        query_ICA, recurrent_ICG = mixed[..., : c.attention_dim], mixed[..., c.attention_dim :]
        # Backward computes the [I, C, P, A] energies again instead of keeping one for each token.
        context_ICE, alpha_ICP = jax.checkpoint(Captioner.attend, static_argnums=0)(self, memory, query_ICA)
        if c.attention_gate:
            context_ICE = context_ICE * jax.nn.sigmoid(self.gate(hidden_ICH))
        input_ICG = word_ICG + self.context(context_ICE)
        if carry.cell_ICH is not None:
            i, f, g, o = jnp.split(input_ICG + recurrent_ICG, 4, -1)
            # The forget gate starts open (Jozefowicz et al. 2015).
            cell = jax.nn.sigmoid(f + 1) * carry.cell_ICH + jax.nn.sigmoid(i) * jnp.tanh(g)
            return Carry(jax.nn.sigmoid(o) * jnp.tanh(cell), cell), alpha_ICP
        # Cho et al. 2014, the reset gate after the product, as cuDNN and Keras have it.
        z_x, r_x, n_x = jnp.split(input_ICG, 3, -1)
        z_h, r_h, n_h = jnp.split(recurrent_ICG, 3, -1)
        z = jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
        return Carry(z * hidden_ICH + (1 - z) * n, None), alpha_ICP

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., H] -> float32 logits [..., V]."""
        return self.vocabulary(self.head(hidden)).astype(jnp.float32)

    def __call__(self, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Teacher forcing: hidden states [I, C, T, H] after each given token, attention weights [I, C, T, P]."""
        memory = self.remember(feats_IPF)
        words_TICG = self.read(jnp.moveaxis(tokens_ICT, 2, 0))

        def body(carry: Carry, word_ICG: jax.Array) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
            carry, alpha_ICP = self.step(memory, carry, word_ICG)
            return carry, (carry.hidden_ICH, alpha_ICP)

        _, (hidden, alpha) = jax.lax.scan(body, self.start(memory, tokens_ICT.shape[1]), words_TICG)
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
