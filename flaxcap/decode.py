"""Captions from a trained model, one token after the other: greedy or sampled, batched and jitted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap import config as config_lib
from flaxcap.cell import Carry
from flaxcap.model import Params
from flaxcap.text import END, PAD, START, UNK
from flaxcap.train_step import Bind


class Decoded(NamedTuple):
    """`tokens_IT` ends with <end>, then <pad>; `alpha_ITP` is where the model looked for each token."""

    tokens_IT: jax.Array  # int32
    log_prob_I: jax.Array  # float32: of the caption and its <end> under the model, in nats
    alpha_ITP: jax.Array  # float32


class _Loop(NamedTuple):
    t: jax.Array
    carry: Carry
    last_I: jax.Array
    done_I: jax.Array
    out: Decoded


def make_decode(bind: Bind, config: config_lib.Decode) -> Callable[[Params, jax.Array, jax.Array], Decoded]:
    """`decode(params, feats_IPF, key) -> Decoded`, jitted; T is `config.max_length`.

    <pad>, <start> and <unk> are never chosen, and the last token is <end>. Greedy ignores the key. Each image is
    decoded as if it were alone: image i draws from `fold_in(key, i)`.
    """

    def choose(logits_IV: jax.Array, key: jax.Array) -> jax.Array:
        if config.method == "greedy":
            return logits_IV.argmax(-1)
        logits_IV = logits_IV / config.temperature
        if 0 < config.top_k < logits_IV.shape[-1]:
            least = jax.lax.top_k(logits_IV, config.top_k)[0][:, -1:]
            logits_IV = jnp.where(logits_IV < least, -jnp.inf, logits_IV)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(logits_IV)))
        return jax.vmap(jax.random.categorical)(keys, logits_IV)

    @jax.jit
    def decode(params: Params, feats_IPF: jax.Array, key: jax.Array) -> Decoded:
        model = bind(params)
        memory = model.remember(feats_IPF)
        images, positions = memory.values_IPE.shape[:2]
        length = config.max_length
        vocabulary = params["vocabulary"]["bias"].shape[0]
        words = np.ones(vocabulary, bool)
        words[[PAD, START, UNK]] = False
        only_end = np.arange(vocabulary) == END

        def body(s: _Loop) -> _Loop:
            carry, alpha_ICP, _ = model.cell(memory, s.carry, model.read(s.last_I[:, None]))
            logits_IV = model.logits(carry.hidden_ICH)[:, 0]
            allowed_V = jnp.where(s.t == length - 1, only_end, words)
            chosen_I = choose(jnp.where(allowed_V[None], logits_IV, -jnp.inf), jax.random.fold_in(key, s.t))
            chosen_I = jnp.where(s.done_I, PAD, chosen_I).astype(jnp.int32)
            log_prob_I = jnp.take_along_axis(jax.nn.log_softmax(logits_IV), chosen_I[:, None], 1)[:, 0]
            out = Decoded(
                s.out.tokens_IT.at[:, s.t].set(chosen_I),
                s.out.log_prob_I + jnp.where(s.done_I, 0, log_prob_I),
                s.out.alpha_ITP.at[:, s.t].set(jnp.where(s.done_I[:, None], 0, alpha_ICP[:, 0])),
            )
            return _Loop(s.t + 1, carry, chosen_I, s.done_I | (chosen_I == END), out)

        empty = Decoded(
            jnp.full((images, length), PAD, jnp.int32),
            jnp.zeros(images),
            jnp.zeros((images, length, positions)),
        )
        first = _Loop(
            jnp.zeros((), jnp.int32),
            model.start(memory, 1),
            jnp.full(images, START, jnp.int32),
            jnp.zeros(images, bool),
            empty,
        )
        return jax.lax.while_loop(lambda s: (s.t < length) & ~s.done_I.all(), body, first).out

    return decode
