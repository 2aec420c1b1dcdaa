"""The caption decoder and its training loss as the papers write them: the best place to start reading flaxcap.

Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044), in plain JAX, for one caption and one token at a time. The
decoder has no batch axis, and no gradient is written by hand. Tests compare the trainer's logits, losses and gradients
with these functions in float64. The package holds the fast versions:

    here            in the package
    attend          flaxcap/models/attention.py
    decoder         flaxcap/models/recurrent.py (an image, a batch) and flaxcap/models/cell.py (a token)
    caption_loss    flaxcap/training/objective.py and flaxcap/training/losses.py

The capital letters at the end of a name are the array's axes, in order: `feats_PF` has P rows of F numbers. The
letters used here are a part of the glossary in flaxcap/__init__.py:

    P  positions of an image                   H  hidden width: the recurrent state
    F  feature width, of the image encoder     E  word embedding width
    D  width that features are projected to    V  vocabulary
    A  attention width                         T  time: tokens
    I  images in a batch                       C  captions an image
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import Config, Model
from flaxcap.text.vocabulary import PAD


def dense(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    """Returns x @ kernel + bias; not every layer has a bias."""
    y = x @ layer["kernel"]
    return y + jnp.broadcast_to(layer["bias"], y.shape) if "bias" in layer else y


def attend(keys_PA: Any, values_PD: Any, score_A: Any, query_A: Any) -> tuple[jax.Array, jax.Array]:
    """Computes additive attention for one query (Bahdanau et al. 2015, arXiv:1409.0473).

    Args:
      keys_PA: a key for each position.
      values_PD: a value for each position.
      score_A: the learned vector that weighs the energies.
      query_A: the query.

    Returns:
      The context `[D]`, which is the weighted sum of the values, and the attention weights `alpha_P`.
    """
    alpha_P = jax.nn.softmax(jnp.tanh(keys_PA + query_A[None]) @ score_A)
    return alpha_P @ values_PD, alpha_P


def decoder(config: Model, params: Any, feats_PF: Any, tokens_T: Any) -> tuple[jax.Array, jax.Array]:
    """Predicts the next token after each given token of one caption.

    Args:
      config: the widths, and the variants of the decoder.
      params: the parameters of `flaxcap.models.recurrent.RecurrentDecoder`.
      feats_PF: the features of one image.
      tokens_T: the given token ids; the first is <start>.

    Returns:
      The logits `[T, V]` and the attention weights `alpha_TP`.
    """
    # Once an image: the values and the keys of attention.
    values_PD = dense(params["image"], feats_PF)
    if config.positions:
        values_PD = values_PD + params["position"]
    values_PD = jax.nn.relu(values_PD)
    keys_PA = dense(params["key"], values_PD)

    # The state before the first token: h, and for an LSTM also c.
    cell, attention, hidden = params["cell"], config.attention_dim, config.hidden_dim
    h = c = jnp.zeros(hidden, values_PD.dtype)
    if config.initial_state == "mean":
        state = jnp.tanh(dense(params["first"], values_PD.mean(0)))
        h, c = state[:hidden], state[hidden:]

    logits, alphas = [], []
    for token in tokens_T:
        # Attention. One product of h gives the query and the recurrent part of the gates.
        product = dense(cell["recurrent"], h)
        query_A, recurrent = product[:attention], product[attention:]
        context_D, alpha_P = attend(keys_PA, values_PD, cell["score"]["kernel"][:, 0], query_A)
        if config.attention_gate:
            context_D = context_D * jax.nn.sigmoid(dense(cell["gate"], h))

        # The next state, from the word, the context and h.
        word_E = params["embedding"]["embedding"][token]
        inputs = dense(params["word"], word_E) + dense(cell["context"], context_D)
        if config.cell == "gru":
            # Cho et al. 2014, with the reset gate after the recurrent product, as in cuDNN and Keras.
            (z_x, r_x, new_x), (z_h, r_h, new_h) = inputs.reshape(3, hidden), recurrent.reshape(3, hidden)
            z, r = jax.nn.sigmoid(z_x + z_h), jax.nn.sigmoid(r_x + r_h)
            h = z * h + (1 - z) * jnp.tanh(new_x + r * new_h)
        else:
            # Hochreiter & Schmidhuber 1997. The forget gate f starts open: Jozefowicz et al. 2015 add 1.
            i, f, g, o = (inputs + recurrent).reshape(4, hidden)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)

        # The output layers. A deep output (Xu et al., equation 7) also takes the context and the word.
        if config.output == "deep":
            head = jnp.tanh(dense(params["head"], jnp.concatenate([h, context_D, word_E])))
        else:
            head = dense(params["head"], h)
        vocabulary = params["vocabulary"]
        if config.tied:
            vocabulary = vocabulary | {"kernel": params["embedding"]["embedding"].T}
        logits.append(dense(vocabulary, head))
        alphas.append(alpha_P)
    return jnp.stack(logits), jnp.stack(alphas)


def logits(config: Model, params: Any, feats_PF: Any, tokens_T: Any) -> jax.Array:
    """Returns the logits `[T, V]` of `decoder`, without the attention weights."""
    return decoder(config, params, feats_PF, tokens_T)[0]


def caption_loss(config: Config, params: Any, feats_PF: Any, tokens_T: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the losses of one caption, summed over its tokens. <start> is given, not predicted.

    Args:
      config: the decoder, and the weights of the additional terms.
      params: the parameters of the decoder.
      feats_PF: the features of one image.
      tokens_T: the caption with <start> and <end>, without padding.

    Returns:
      The objective, which training minimises, and the cross-entropy in nats, which training logs.
    """
    logits_TV, alpha_TP = decoder(config.model, params, feats_PF, tokens_T[:-1])
    log_p_TV = jax.nn.log_softmax(logits_TV)
    nats = -jnp.stack([log_p_V[token] for log_p_V, token in zip(log_p_TV, tokens_T[1:], strict=True)]).sum()
    # Label smoothing (Szegedy et al. 2015, arXiv:1512.00567): a share of the target is spread over all words.
    smoothing = config.train.label_smoothing
    smoothed = (1 - smoothing) * nats - smoothing * log_p_TV.mean(-1).sum()
    # Doubly stochastic attention (Xu et al., equation 14): every position gets a total weight near 1.
    unevenness = ((1 - alpha_TP.sum(0)) ** 2).sum()
    return smoothed + config.train.doubly_stochastic * unevenness, nats


def batch_loss(config: Config, params: Any, feats_IPF: Any, tokens_ICT: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Computes the losses of a batch: the sums of `caption_loss`, divided by the number of predicted tokens.

    Args:
      config: the decoder, and the weights of the additional terms.
      params: the parameters of the decoder.
      feats_IPF: the features of I images.
      tokens_ICT: C captions of each image, padded with <pad>. An absent caption is all <pad>.

    Returns:
      The objective and the cross-entropy, each per token.
    """
    losses, tokens = [], 0
    for i, c in np.ndindex(tokens_ICT.shape[:2]):
        length = int((tokens_ICT[i, c] != PAD).sum())
        if length:
            losses.append(jnp.stack(caption_loss(config, params, feats_IPF[i], tokens_ICT[i, c, :length])))
            tokens += length - 1
    objective, nats = jnp.stack(losses).sum(0) / tokens
    return objective, nats


def in_float64(function: Callable, *arguments: Any) -> Any:
    """Returns `function(*arguments)` computed in float64, as NumPy arrays: the expected values for float32.

    Args:
      function: takes and returns pytrees of arrays.
      *arguments: converted to float64 where they hold floating-point numbers.
    """

    def wide(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(lambda x: jnp.asarray(wide(x)), arguments)))
