"""The recurrent cell: attention and a GRU or LSTM.

Training runs `unroll` over the tokens of captions. Decoding calls the same cell once a token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from flaxcap.config import Model
from flaxcap.models import attention, hard_attention, matmul


class Memory(NamedTuple):
    """The part of an image's computation that all its captions share."""

    values_IPD: jax.Array
    exp_keys_IPA: jax.Array  # only `attention.attend` may read it
    valid_IP: jax.Array | None = None  # bool: the positions that an image has; None: all


class Carry(NamedTuple):
    """The recurrent state; `cell_ICH` is None for a GRU."""

    hidden_ICH: jax.Array
    cell_ICH: jax.Array | None


class StepNoise(NamedTuple):
    """Random draws of training for one token; None: no draw. Masks hold 0 or 1 / (1 - share)."""

    hidden_ICH: jax.Array | None = None  # mask of the state that enters the recurrent product
    alpha_ICP: jax.Array | None = None  # mask of the attention weights
    gumbel_ICP: jax.Array | None = None  # hard attention: see `hard_attention.Draws`
    hard_I: jax.Array | None = None


class CellNoise(NamedTuple):
    """Random draws of training for all tokens. `hidden_ICH` is the same at every token (arXiv:1512.05287)."""

    hidden_ICH: jax.Array | None = None
    alpha_TICP: jax.Array | None = None
    gumbel_TICP: jax.Array | None = None
    hard_I: jax.Array | None = None


NO_CELL_NOISE = CellNoise()


class CellOutputs(NamedTuple):
    """The cell's outputs at every token. The context is the one after the gate, if there is a gate."""

    hidden_TICH: jax.Array
    alpha_TICP: jax.Array
    context_TICD: jax.Array


def _recurrent_init(attention_dim: int, hidden_dim: int) -> Callable:
    """Initialises the query's columns Glorot-uniform and each gate's columns orthogonal, as separate Keras layers."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        gates = (shape[1] - attention_dim) // hidden_dim
        keys = jax.random.split(key, gates + 1)
        query = initializers.glorot_uniform()(keys[0], (hidden_dim, attention_dim), dtype)
        square = initializers.orthogonal()
        return jnp.concatenate([query, *(square(k, (hidden_dim, hidden_dim), dtype) for k in keys[1:])], 1)

    return init


class Cell(nnx.Module):
    """Attention over the memory, then the next recurrent state."""

    def __init__(self, config: Model, dtype: Any, matmul_dtype: str = "", *, rngs: nnx.Rngs):
        """Initialises the parameters, in float32.

        Args:
          config: the sizes, and the kind of cell.
          dtype: of the arithmetic.
          matmul_dtype: of the numbers that the two large products multiply; "": `dtype`.
          rngs: a stream `params`.
        """
        c = config
        self.config = config
        self.matmul_dtype = matmul_dtype or str(jnp.dtype(dtype))
        self.gates = {"gru": 3, "lstm": 4}[c.cell] * c.hidden_dim  # G
        options: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": jnp.float32,
            "kernel_init": initializers.glorot_uniform(),
            "rngs": rngs,
        }
        self.score = nnx.Linear(c.attention_dim, 1, use_bias=False, **options)
        large: dict[str, Any] = options | {"dot_general": matmul.dot_general(self.matmul_dtype)}
        self.context = nnx.Linear(c.image_dim, self.gates, use_bias=False, **large)
        # One product gives the attention's query and the recurrent part of the gates.
        large["kernel_init"] = _recurrent_init(c.attention_dim, c.hidden_dim)
        self.recurrent = nnx.Linear(c.hidden_dim, c.attention_dim + self.gates, **large)
        if c.attention_gate:
            self.gate = nnx.Linear(c.hidden_dim, 1, **options)

    def split(self, gates: jax.Array) -> list[jax.Array]:
        """Returns `[..., H]` for each gate, from `[..., G]`."""
        return jnp.split(gates, self.gates // self.config.hidden_dim, -1)

    def __call__(
        self,
        memory: Memory,
        carry: Carry,
        word_gates: Sequence[jax.Array],
        noise: StepNoise = StepNoise(),  # noqa: B008
        probe_ICR: jax.Array | None = None,
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """Runs one token.

        Args:
          memory: of the images.
          carry: the state before the token.
          word_gates: the word's part of each gate, arrays `[I, C, H]`.
          noise: random draws of training for this token.
          probe_ICR: zeros, added to the recurrent product. Their gradient is the gradient of the product.

        Returns:
          The next carry, `alpha_ICP` and `context_ICD`.
        """
        c = self.config
        hidden_ICH = carry.hidden_ICH
        mixed_ICR = self.recurrent(hidden_ICH if noise.hidden_ICH is None else hidden_ICH * noise.hidden_ICH)
        if probe_ICR is not None:
            mixed_ICR = mixed_ICR + probe_ICR
        query_ICA, recurrent_ICG = jnp.split(mixed_ICR, [c.attention_dim], -1)
        score_A = self.score.kernel[:, 0].astype(query_ICA.dtype)
        alpha_ICP = attention.attend(memory.exp_keys_IPA, score_A, query_ICA, memory.valid_IP)
        weights_ICP = alpha_ICP
        if noise.gumbel_ICP is not None and noise.hard_I is not None:
            weights_ICP = hard_attention.weights(alpha_ICP, noise.gumbel_ICP, noise.hard_I)
        if noise.alpha_ICP is not None:
            weights_ICP = weights_ICP * noise.alpha_ICP
        context_ICD = jnp.einsum("icp,ipd->icd", weights_ICP.astype(memory.values_IPD.dtype), memory.values_IPD)
        if c.attention_gate:
            context_ICD = context_ICD * jax.nn.sigmoid(self.gate(hidden_ICH))
        inputs = [w + x for w, x in zip(word_gates, self.split(self.context(context_ICD)), strict=True)]
        recurrent = self.split(recurrent_ICG)
        if carry.cell_ICH is not None:
            sums = [x + h for x, h in zip(inputs, recurrent, strict=True)]
            return Carry(*_lstm(*sums, carry.cell_ICH)), alpha_ICP, context_ICD
        (z_x, r_x, n_x), (z_h, r_h, n_h) = inputs, recurrent
        return Carry(_gru(z_x + z_h, r_x + r_h, n_x, n_h, hidden_ICH), None), alpha_ICP, context_ICD


# The backward pass keeps the inputs of the gates and computes the rest again: each token writes less to memory.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@_recomputed
def _gru(z: jax.Array, r: jax.Array, n_x: jax.Array, n_h: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns the next state (Cho et al. 2014). The reset gate follows the product, as in cuDNN and Keras."""
    z = jax.nn.sigmoid(z)
    return z * hidden + (1 - z) * jnp.tanh(n_x + jax.nn.sigmoid(r) * n_h)


@_recomputed
def _lstm(i: jax.Array, f: jax.Array, g: jax.Array, o: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the next hidden and cell state. The forget gate starts open (Jozefowicz et al. 2015)."""
    cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def unroll(
    cell: Cell, memory: Memory, carry: Carry, words_TICG: jax.Array, noise: CellNoise = NO_CELL_NOISE
) -> CellOutputs:
    """Runs the cell over given tokens.

    The gradient of each of the two large kernels is one product over all tokens, after the backward scan. Inside the
    scan it would be read and written at every token.

    Args:
      cell: its parameters receive gradients.
      memory: of the images.
      carry: the state before the first token.
      words_TICG: the words' part of the gates.
      noise: random draws of training.
    """
    graph, weights = nnx.split(cell)
    return _unroll(graph, cell.matmul_dtype, nnx.to_pure_dict(weights), memory, carry, words_TICG, noise)


def _scan(
    graph: Any,
    weights: Any,
    memory: Memory,
    carry: Carry,
    words_TICG: jax.Array,
    noise: CellNoise,
    probes_TICR: jax.Array | None = None,
) -> CellOutputs:
    def bound() -> Cell:
        return nnx.merge(graph, nnx.State(weights))

    def body(carry: Carry, token: tuple) -> tuple[Carry, tuple[jax.Array, ...]]:
        word_gates, alpha_ICP, gumbel_ICP, probe_ICR = token
        of_token = StepNoise(noise.hidden_ICH, alpha_ICP, gumbel_ICP, noise.hard_I)
        carry, alpha_ICP, context_ICD = bound()(memory, carry, word_gates, of_token, probe_ICR)
        return carry, (carry.hidden_ICH, alpha_ICP, context_ICD)

    # Split before the loop: XLA:CPU (jaxlib 0.10) has slow code for a slice of what a loop has sliced.
    tokens = bound().split(words_TICG), noise.alpha_TICP, noise.gumbel_TICP, probes_TICR
    return CellOutputs(*jax.lax.scan(body, carry, tokens)[1])


def _unroll(graph, dtype, weights, memory, carry, words_TICG, noise):
    return _scan(graph, weights, memory, carry, words_TICG, noise)


def _forward(graph, dtype, weights, memory, carry, words_TICG, noise):
    def run(weights, memory, carry, words_TICG, probes_TICR):
        without = dict(weights)  # the two kernels, whose gradients `_backward` computes
        for name in ("recurrent", "context"):
            without[name] = without[name] | {"kernel": jax.lax.stop_gradient(without[name]["kernel"])}
        return _scan(graph, without, memory, carry, words_TICG, noise, probes_TICR)

    width = weights["recurrent"]["kernel"].shape[1]
    probes_TICR = jnp.zeros((*words_TICG.shape[:-1], width), words_TICG.dtype)
    outputs, pull = jax.vjp(run, weights, memory, carry, words_TICG, probes_TICR)
    before_TICH = jnp.concatenate([carry.hidden_ICH[None], outputs.hidden_TICH[:-1]])
    if noise.hidden_ICH is not None:
        before_TICH = before_TICH * noise.hidden_ICH[None]
    return outputs, (pull, before_TICH, outputs.context_TICD)


def _backward(graph, dtype, residuals, d_outputs):
    pull, before_TICH, context_TICD = residuals
    d_weights, d_memory, d_carry, d_words_TICG, d_mixed_TICR = pull(d_outputs)
    d_weights["recurrent"]["kernel"] = matmul.kernel_gradient(before_TICH, d_mixed_TICR, dtype)
    d_weights["context"]["kernel"] = matmul.kernel_gradient(context_TICD, d_words_TICG, dtype)
    return d_weights, d_memory, d_carry, d_words_TICG, None


_unroll = jax.custom_vjp(_unroll, nondiff_argnums=(0, 1))
_unroll.defvjp(_forward, _backward)
