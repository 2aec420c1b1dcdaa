"""The decoder and its loss as the papers write them: plain JAX, one caption and one token at a time.

No batch, nothing hoisted, no scan, no gradient written by hand: readable first. The trainer must be this function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import Config, Model
from flaxcap.text.vocabulary import PAD


def in_float64(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` with every float of them in float64, as NumPy arrays: what float32 should come near to."""

    def wide(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(lambda x: jnp.asarray(wide(x)), arguments)))


def dense(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    y = x @ layer["kernel"]
    return y + jnp.broadcast_to(layer["bias"], y.shape) if "bias" in layer else y


def attend(keys_PA: Any, values_PE: Any, score_A: Any, query_A: Any) -> tuple[jax.Array, jax.Array]:
    """Context [E] and weights alpha [P] of one query (Bahdanau et al. 2015)."""
    alpha_P = jax.nn.softmax(jnp.tanh(keys_PA + query_A[None]) @ score_A)
    return alpha_P @ values_PE, alpha_P


def decoder(config: Model, params: Any, feats_PF: Any, tokens_T: Any) -> tuple[jax.Array, jax.Array]:
    """Of one caption: logits [T, V] after each given token, and attention weights [T, P]."""
    values_PE = dense(params["image"], feats_PF)
    if config.positions:
        values_PE = values_PE + params["position"]
    values_PE = jax.nn.relu(values_PE)
    keys_PA = dense(params["key"], values_PE)
    cell, n, a = params["cell"], config.hidden_dim, config.attention_dim

    h = c = jnp.zeros(n, values_PE.dtype)
    if config.initial_state == "mean":
        state = jnp.tanh(dense(params["first"], values_PE.mean(0)))
        h, c = state[:n], state[n:]
    found, looked = [], []
    for token in tokens_T:
        word_E = params["embedding"]["embedding"][token]
        mixed = dense(cell["recurrent"], h)
        context_E, alpha_P = attend(keys_PA, values_PE, cell["score"]["kernel"][:, 0], mixed[:a])
        if config.attention_gate:
            context_E = context_E * jax.nn.sigmoid(dense(cell["gate"], h))
        inputs = dense(params["word"], word_E) + dense(cell["context"], context_E)
        if config.cell == "gru":
            (z, r, new), (z_h, r_h, new_h) = inputs.reshape(3, n), mixed[a:].reshape(3, n)
            z = jax.nn.sigmoid(z + z_h)
            h = z * h + (1 - z) * jnp.tanh(new + jax.nn.sigmoid(r + r_h) * new_h)
        else:
            i, f, g, o = (inputs + mixed[a:]).reshape(4, n)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        looked.append(alpha_P)
        if config.output == "deep":
            words = jnp.tanh(dense(params["head"], jnp.concatenate([h, context_E, word_E])))
        else:
            words = dense(params["head"], h)
        vocabulary = params["vocabulary"]
        if config.tied:
            vocabulary = vocabulary | {"kernel": params["embedding"]["embedding"].T}
        found.append(dense(vocabulary, words))
    return jnp.stack(found), jnp.stack(looked)


def logits(config: Model, params: Any, feats_PF: Any, tokens_T: Any) -> jax.Array:
    """Logits [T, V] after each given token of one caption."""
    return decoder(config, params, feats_PF, tokens_T)[0]


def caption_loss(config: Config, params: Any, feats_PF: Any, tokens_T: Any) -> tuple[jax.Array, jax.Array]:
    """What is minimised of one unpadded caption, and its cross-entropy in nats: of all tokens but its first, summed."""
    logits_TV, alpha_TP = decoder(config.model, params, feats_PF, tokens_T[:-1])
    log_p_TV = jax.nn.log_softmax(logits_TV)
    nats = -jnp.stack([log_p_V[token] for log_p_V, token in zip(log_p_TV, tokens_T[1:], strict=True)]).sum()
    smoothing = config.train.label_smoothing
    smoothed = (1 - smoothing) * nats - smoothing * log_p_TV.mean(-1).sum()
    unevenness = ((1 - alpha_TP.sum(0)) ** 2).sum()
    return smoothed + config.train.doubly_stochastic * unevenness, nats


def batch_loss(config: Config, params: Any, feats_IPF: Any, tokens_ICT: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The mean of both over all real tokens of a batch; captions that are all <pad> are absent."""
    losses, tokens = [], 0
    for i, c in np.ndindex(tokens_ICT.shape[:2]):
        length = int((tokens_ICT[i, c] != PAD).sum())
        if length:
            losses.append(jnp.stack(caption_loss(config, params, feats_IPF[i], tokens_ICT[i, c, :length])))
            tokens += length - 1
    loss, nats = jnp.stack(losses).sum(0) / tokens
    return loss, nats
