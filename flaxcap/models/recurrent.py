"""The recurrent caption decoder: additive attention over an image's features, and a GRU or LSTM.

Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044), in the form of TensorFlow's tutorial "image captioning with
visual attention". tests/reference.py writes the same decoder for one caption and one token at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from flaxcap.config import ConfigError, Dropout, Model, Train
from flaxcap.models import attention, dropout, hard_attention
from flaxcap.models.cell import NO_CELL_NOISE, Carry, Cell, CellNoise, Memory, unroll
from flaxcap.models.decoder import Params, Sizes
from flaxcap.models.matmul import dot_general
from flaxcap.models.output_layer import Weights


class Noise(NamedTuple):
    """Random draws of training for a microbatch; None: no draw. Masks hold 0 or 1 / (1 - share)."""

    values_IPD: jax.Array | None = None
    words_TICE: jax.Array | None = None
    states_TICS: jax.Array | None = None
    cell: CellNoise = NO_CELL_NOISE


NO_NOISE = Noise()


class _Bias(nnx.Module):
    """The bias of a vocabulary layer whose kernel is the embedding."""

    def __init__(self, size: int):
        self.bias = nnx.Param(jnp.zeros(size))


class RecurrentDecoder(nnx.Module):
    """Attention over a memory and a recurrent cell; see `decoder.CaptionDecoder`."""

    def __init__(self, config: Model, sizes: Sizes, dtype: Any, matmul_dtype: str = "", *, rngs: nnx.Rngs):
        """Initialises the parameters, in float32.

        Args:
          config: the widths, and the variants.
          sizes: of the data.
          dtype: of the arithmetic.
          matmul_dtype: of the numbers that matrix products multiply; "": `dtype`.
          rngs: a stream `params`.

        Raises:
          ConfigError: learned positions, but the number of positions varies.
        """
        c = config
        self.config, self.sizes = config, sizes
        self.dtype = jnp.dtype(dtype)
        self.matmul_dtype = matmul_dtype or str(self.dtype)
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.float32, "rngs": rngs}
        linear: dict[str, Any] = options | {
            "kernel_init": initializers.glorot_uniform(),
            "dot_general": dot_general(self.matmul_dtype),
        }
        self.image = nnx.Linear(sizes.features, c.image_dim, **linear)
        if c.positions:
            if sizes.positions_vary:
                raise ConfigError(
                    "--config.model.positions=True: expected False, as the images' features have no fixed positions"
                )
            shape = (sizes.positions, c.image_dim)
            self.position = nnx.Param(initializers.normal(0.5)(rngs.params(), shape, jnp.float32))
        self.key = nnx.Linear(c.image_dim, c.attention_dim, **linear)
        self.cell = Cell(c, self.dtype, self.matmul_dtype, rngs=rngs)
        embedding_init = initializers.uniform(0.1)
        self.embedding = nnx.Embed(sizes.vocabulary, c.embedding_dim, embedding_init=embedding_init, **options)
        self.word = nnx.Linear(c.embedding_dim, self.cell.gates, **linear)
        if c.initial_state == "mean":
            self.first = nnx.Linear(c.image_dim, c.hidden_dim * (2 if c.cell == "lstm" else 1), **linear)
        self.head = nnx.Linear(_states(c), c.head_dim, **linear)
        self.vocabulary = _Bias(sizes.vocabulary) if c.tied else nnx.Linear(c.head_dim, sizes.vocabulary, **linear)

    def remember(self, feats_IPF: jax.Array, mask_IPD: jax.Array | None = None) -> Memory:
        """Returns the projected features and their attention keys. `mask_IPD`: dropout of the projected features."""
        valid_IP = None
        if self.sizes.positions_vary:
            valid_IP = ~jnp.isnan(feats_IPF[..., 0])
            feats_IPF = jnp.where(valid_IP[..., None], feats_IPF, 0)
        values_IPD = self.image(feats_IPF.astype(self.dtype))
        if self.config.positions:
            values_IPD = values_IPD + self.position[None].astype(self.dtype)
        values_IPD = dropout.apply(jax.nn.relu(values_IPD), mask_IPD)
        return Memory(values_IPD, attention.exp_keys(self.key(values_IPD)), valid_IP)

    def start(self, memory: Memory, captions: int, length: int = 0) -> Carry:
        """Returns the initial recurrent state: zeros, or projected from the mean image feature."""
        del length  # the state has one size
        c, images = self.config, memory.values_IPD.shape[0]
        if c.initial_state == "mean":
            state = jnp.tanh(self.first(_mean(memory)))[:, None]
            state = jnp.broadcast_to(state, (images, captions, state.shape[-1]))
        else:
            state = jnp.zeros((images, captions, c.hidden_dim * (2 if c.cell == "lstm" else 1)), self.dtype)
        return Carry(state[..., : c.hidden_dim], state[..., c.hidden_dim :] if c.cell == "lstm" else None)

    def tables(self) -> jax.Array:
        """Returns `[V, G]`: each word's part of the gates."""
        return self.word(self.embedding.embedding[...])

    def step(
        self, tables: jax.Array, memory: Memory, carry: Carry, tokens_IK: jax.Array, t: jax.Array
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """Returns the next carry, `states_IKS` and `alpha_IKP`."""
        del t  # the state has no position
        carry, alpha_IKP, context_IKD = self.cell(memory, carry, self.cell.split(tables[tokens_IK]))
        return carry, self._states(carry.hidden_ICH, context_IKD, self.embedding(tokens_IK)), alpha_IKP

    def __call__(
        self, feats_IPF: jax.Array, tokens_ICT: jax.Array, noise: Noise | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `states_TICS` and `alpha_TICP` after each given token."""
        noise = noise or NO_NOISE
        memory = self.remember(feats_IPF, noise.values_IPD)
        words_TICE = dropout.apply(self.embedding(jnp.moveaxis(tokens_ICT, 2, 0)), noise.words_TICE)
        carry = self.start(memory, tokens_ICT.shape[1])
        outputs = unroll(self.cell, memory, carry, self.word(words_TICE), noise.cell)
        states_TICS = self._states(outputs.hidden_TICH, outputs.context_TICD, words_TICE)
        return dropout.apply(states_TICS, noise.states_TICS), outputs.alpha_TICP

    def _states(self, hidden: jax.Array, context: jax.Array, words: jax.Array) -> jax.Array:
        """Returns what the output layers take, `[..., S]`. A deep output also takes the context and the word."""
        return jnp.concatenate([hidden, context, words], -1) if self.config.output == "deep" else hidden

    def output_weights(self) -> Weights:
        """Returns the two layers between states and logits."""
        head, vocabulary = (nnx.to_pure_dict(nnx.state(layer)) for layer in (self.head, self.vocabulary))
        if self.config.tied:
            vocabulary["kernel"] = self.embedding.embedding[...].T
        return Weights(head, vocabulary, self.config.output == "deep", self.matmul_dtype)

    def draw_noise(self, keys_I: jax.Array, captions: int, time: int, dropout_config: Dropout) -> Noise:
        """Returns the dropout masks and the draws of hard attention."""
        c, d, positions = self.config, dropout_config, self.sizes.positions

        def mask(number: int, share: float, *shape: int, axis: int = 0) -> jax.Array | None:
            return dropout.mask(keys_I, number, share, shape, self.dtype, axis)

        gumbel_TICP, hard_I = None, None
        if c.attention == "hard":
            gumbel_TICP, hard_I = hard_attention.draw(keys_I, time, captions, positions)
        return Noise(
            mask(0, d.image, positions, c.image_dim),
            mask(1, d.embedding, time, captions, c.embedding_dim, axis=1),
            mask(2, d.output, time, captions, _states(c), axis=1),
            CellNoise(
                mask(3, d.recurrent, captions, c.hidden_dim),
                mask(4, d.attention, time, captions, positions, axis=1),
                gumbel_TICP,
                hard_I,
            ),
        )

    def auxiliary_loss(
        self,
        noise: Noise,
        alpha_TICP: jax.Array,
        nats_TIC: jax.Array,
        real_TIC: jax.Array,
        baseline: jax.Array,
        config: Train,
    ) -> jax.Array | float:
        """Returns the loss of hard attention, 0 for soft attention; see `decoder.CaptionDecoder.auxiliary_loss`."""
        gumbel_TICP, hard_I = noise.cell.gumbel_TICP, noise.cell.hard_I
        if gumbel_TICP is None or hard_I is None:
            return 0.0
        draws = hard_attention.Draws(gumbel_TICP, hard_I)
        return hard_attention.loss(draws, alpha_TICP, nats_TIC, real_TIC, baseline, config)

    @staticmethod
    def with_word_vectors(params: Params, vectors: dict[int, np.ndarray]) -> Params:
        """Returns the parameters with the embeddings of these token ids replaced."""
        table_VE = np.array(params["embedding"]["embedding"])
        table_VE[list(vectors)] = list(vectors.values())
        return params | {"embedding": {"embedding": table_VE}}

    @staticmethod
    def flops(config: Model, *, images: int, tokens: int, positions: int, features: int, vocabulary: int) -> int:
        """Returns the operations of a forward pass. A multiplication and an addition are two; padding is left out.

        Once an image: the projection and the attention keys. Once a predicted token: the recurrent product, the scores,
        the context, the gates and the two output layers. Elementwise arithmetic is left out.
        """
        m = config
        gates = (3 if m.cell == "gru" else 4) * m.hidden_dim
        image = positions * (features * m.image_dim + m.image_dim * m.attention_dim)
        if m.initial_state == "mean":
            image += m.image_dim * m.hidden_dim * (2 if m.cell == "lstm" else 1)
        token = m.hidden_dim * (m.attention_dim + gates)
        token += positions * (m.attention_dim + m.image_dim)
        token += (m.image_dim + m.embedding_dim) * gates
        token += _states(m) * m.head_dim + m.head_dim * vocabulary
        if m.attention_gate:
            token += m.hidden_dim
        return 2 * (images * image + tokens * token)


def _states(config: Model) -> int:
    """Returns S, the width of the states that the output layers take."""
    return config.hidden_dim + (config.image_dim + config.embedding_dim if config.output == "deep" else 0)


def _mean(memory: Memory) -> jax.Array:
    """Returns the mean of an image's projected features, `[I, D]`, over the positions that it has."""
    if memory.valid_IP is None:
        return memory.values_IPD.mean(1)
    valid_IP1 = memory.valid_IP[..., None].astype(memory.values_IPD.dtype)
    return (memory.values_IPD * valid_IP1).sum(1) / valid_IP1.sum(1)
