"""The recurrent cell: attention and a GRU or LSTM, and its run over given tokens.

One cell, two drivers: training runs `unroll` over the tokens of the captions, decoding calls the cell over its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from flaxcap import config as config_lib
from flaxcap.models import attention, matmul


class Memory(NamedTuple):
    """What the decoder looks at: computed once an image, whatever the number of its captions."""

    values_IPE: jax.Array
    keys_IPA: jax.Array


class Carry(NamedTuple):
    """The recurrent state; `cell_ICH` is None for a GRU."""

    hidden_ICH: jax.Array
    cell_ICH: jax.Array | None


class Noise(NamedTuple):
    """What training hides from the cell, or draws for it; None: nothing. Masks hold 0 or 1 / (the share kept)."""

    hidden_ICH: jax.Array | None = None  # mask of the state that enters the recurrent product, the same at every token
    alpha_TICP: jax.Array | None = None  # mask of the attention weights
    gumbel_TICP: jax.Array | None = None  # hard attention: Gumbel noise that draws the place that is looked at
    hard_I: jax.Array | None = None  # bool: the images that look at one place, not at the weighted sum

    def at(self, token: tuple[jax.Array | None, jax.Array | None]) -> "Noise":
        """With what was drawn for one token."""
        return self._replace(alpha_TICP=token[0], gumbel_TICP=token[1])


NO_NOISE = Noise()


def place(alpha_P: jax.Array, gumbel_P: jax.Array) -> jax.Array:
    """One-hot, over the last axis: a place drawn with the probabilities alpha (Gumbel 1954)."""
    best = jnp.argmax(jnp.log(alpha_P) + gumbel_P, -1)
    return jax.nn.one_hot(best, alpha_P.shape[-1], dtype=alpha_P.dtype)


class Seen(NamedTuple):
    """Of every token: the state after it, where the model looked, and what it saw there (after the gate, if any)."""

    hidden_TICH: jax.Array
    alpha_TICP: jax.Array
    context_TICE: jax.Array


def _recurrent_init(attention_dim: int, hidden_dim: int) -> Callable:
    """The query's columns Glorot-uniform, each gate's columns orthogonal, as Keras initialises them apart."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        gates = (shape[1] - attention_dim) // hidden_dim
        keys = jax.random.split(key, gates + 1)
        query = initializers.glorot_uniform()(keys[0], (hidden_dim, attention_dim), dtype)
        square = initializers.orthogonal()
        return jnp.concatenate([query, *(square(k, (hidden_dim, hidden_dim), dtype) for k in keys[1:])], 1)

    return init


class Cell(nnx.Module):
    """One token: where to look, and the next state."""

    def __init__(self, config: config_lib.Model, dtype: Any, matmul_dtype: str = "", *, rngs: nnx.Rngs):
        """`matmul_dtype`: of the numbers that the two large products multiply; "": `dtype`."""
        c = config
        self.config = config
        self.matmul_dtype = matmul_dtype or str(jnp.dtype(dtype))
        self.gates = {"gru": 3, "lstm": 4}[c.cell] * c.hidden_dim
        options: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": jnp.float32,
            "kernel_init": initializers.glorot_uniform(),
            "rngs": rngs,
        }
        self.score = nnx.Linear(c.attention_dim, 1, use_bias=False, **options)
        large: dict[str, Any] = options | {"dot_general": matmul.dot_general(self.matmul_dtype)}
        self.context = nnx.Linear(c.image_dim, self.gates, use_bias=False, **large)
        # One product gives the attention's query and the gates' recurrent part.
        large["kernel_init"] = _recurrent_init(c.attention_dim, c.hidden_dim)
        self.recurrent = nnx.Linear(c.hidden_dim, c.attention_dim + self.gates, **large)
        if c.attention_gate:
            self.gate = nnx.Linear(c.hidden_dim, 1, **options)

    def __call__(
        self,
        memory: Memory,
        carry: Carry,
        word_ICG: jax.Array,
        noise: Noise = NO_NOISE,
        probe_ICR: jax.Array | None = None,
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """The next state, where the model looked for it, `alpha_ICP`, and what it saw, `context_ICE`.

        `word_ICG`: the token's part of the gates. `noise`: of this token. `probe_ICR` is added to the recurrent
        product, whose gradient it thereby takes.
        """
        return self.gated(memory, carry, self.split(word_ICG), noise, probe_ICR)

    def split(self, gates_ICG: jax.Array) -> list[jax.Array]:
        """`[..., H]` of each gate."""
        return jnp.split(gates_ICG, self.gates // self.config.hidden_dim, -1)

    def gated(
        self,
        memory: Memory,
        carry: Carry,
        words_GICH: Sequence[jax.Array],
        noise: Noise = NO_NOISE,
        probe_ICR: jax.Array | None = None,
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """The same, of a word that is split."""
        c = self.config
        hidden_ICH = carry.hidden_ICH
        mixed_ICR = self.recurrent(hidden_ICH if noise.hidden_ICH is None else hidden_ICH * noise.hidden_ICH)
        if probe_ICR is not None:
            mixed_ICR = mixed_ICR + probe_ICR
        query_ICA, recurrent_ICG = jnp.split(mixed_ICR, [c.attention_dim], -1)
        score_A = self.score.kernel[:, 0].astype(query_ICA.dtype)
        alpha_ICP = attention.attend(memory.keys_IPA, score_A, query_ICA)
        seen_ICP = alpha_ICP
        if noise.gumbel_TICP is not None and noise.hard_I is not None:
            hard_I11 = noise.hard_I[:, None, None]
            seen_ICP = jnp.where(hard_I11, jax.lax.stop_gradient(place(alpha_ICP, noise.gumbel_TICP)), alpha_ICP)
        if noise.alpha_TICP is not None:
            seen_ICP = seen_ICP * noise.alpha_TICP
        context_ICE = jnp.einsum("icp,ipe->ice", seen_ICP.astype(memory.values_IPE.dtype), memory.values_IPE)
        if c.attention_gate:
            context_ICE = context_ICE * jax.nn.sigmoid(self.gate(hidden_ICH))
        inputs = [w + x for w, x in zip(words_GICH, self.split(self.context(context_ICE)), strict=True)]
        recurrent = self.split(recurrent_ICG)
        if carry.cell_ICH is not None:
            sums = [x + h for x, h in zip(inputs, recurrent, strict=True)]
            return Carry(*_lstm(*sums, carry.cell_ICH)), alpha_ICP, context_ICE
        (z_x, r_x, n_x), (z_h, r_h, n_h) = inputs, recurrent
        return Carry(_gru(z_x + z_h, r_x + r_h, n_x, n_h, hidden_ICH), None), alpha_ICP, context_ICE


# Of the gates, backward keeps what goes in and computes the rest again: less is written at every token.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@_recomputed
def _gru(z: jax.Array, r: jax.Array, n_x: jax.Array, n_h: jax.Array, hidden: jax.Array) -> jax.Array:
    """Cho et al. 2014, the reset gate after the product, as cuDNN and Keras have it."""
    z = jax.nn.sigmoid(z)
    return z * hidden + (1 - z) * jnp.tanh(n_x + jax.nn.sigmoid(r) * n_h)


@_recomputed
def _lstm(i: jax.Array, f: jax.Array, g: jax.Array, o: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next hidden and cell state. The forget gate starts open (Jozefowicz et al. 2015)."""
    cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def unroll(cell: Cell, memory: Memory, carry: Carry, words_TICG: jax.Array, noise: Noise = NO_NOISE) -> Seen:
    """The cell over given tokens.

    The gradients of its two large kernels are each one product over all the tokens, after the backward scan; inside it
    they would be read and written at every token.
    """
    graph, weights = nnx.split(cell)
    return _unroll(graph, cell.matmul_dtype, nnx.to_pure_dict(weights), memory, carry, words_TICG, noise)


def _scan(
    graph: Any,
    weights: Any,
    memory: Memory,
    carry: Carry,
    words_TICG: jax.Array,
    noise: Noise,
    probes_TICR: jax.Array | None = None,
) -> Seen:
    def bound() -> Cell:
        return nnx.merge(graph, nnx.State(weights))

    def body(carry: Carry, token: tuple) -> tuple[Carry, Seen]:
        words_GICH, drawn, probe_ICR = token
        carry, alpha_ICP, context_ICE = bound().gated(memory, carry, words_GICH, noise.at(drawn), probe_ICR)
        return carry, Seen(carry.hidden_ICH, alpha_ICP, context_ICE)

    drawn = noise.alpha_TICP, noise.gumbel_TICP
    # Split here, not at every token: XLA makes slow code, on a CPU, of a slice of what the loop has sliced.
    return jax.lax.scan(body, carry, (bound().split(words_TICG), drawn, probes_TICR))[1]


def _unroll(graph, dtype, weights, memory, carry, words_TICG, noise):
    return _scan(graph, weights, memory, carry, words_TICG, noise)


def _forward(graph, dtype, weights, memory, carry, words_TICG, noise):
    def run(weights, memory, carry, words_TICG, probes_TICR):
        held = dict(weights)
        for name in ("recurrent", "context"):
            held[name] = held[name] | {"kernel": jax.lax.stop_gradient(held[name]["kernel"])}
        return _scan(graph, held, memory, carry, words_TICG, noise, probes_TICR)

    mixed = weights["recurrent"]["kernel"].shape[1]
    probes_TICR = jnp.zeros((*words_TICG.shape[:-1], mixed), words_TICG.dtype)
    seen, pull = jax.vjp(run, weights, memory, carry, words_TICG, probes_TICR)
    before = jnp.concatenate([carry.hidden_ICH[None], seen.hidden_TICH[:-1]])
    if noise.hidden_ICH is not None:
        before = before * noise.hidden_ICH[None]
    return seen, (pull, before, seen.context_TICE)


def _backward(graph, dtype, residuals, given):
    pull, before_TICH, context_TICE = residuals
    d_weights, d_memory, d_carry, d_words_TICG, d_mixed_TICR = pull(given)
    d_weights["recurrent"]["kernel"] = matmul.kernel_gradient(before_TICH, d_mixed_TICR, dtype)
    d_weights["context"]["kernel"] = matmul.kernel_gradient(context_TICE, d_words_TICG, dtype)
    return d_weights, d_memory, d_carry, d_words_TICG, None


_unroll = jax.custom_vjp(_unroll, nondiff_argnums=(0, 1))
_unroll.defvjp(_forward, _backward)
