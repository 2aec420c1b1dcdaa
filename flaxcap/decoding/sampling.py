"""Captions one word at a time: the most probable, or drawn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap import config as config_lib
from flaxcap.decoding.step import Decoded, Step
from flaxcap.text.vocabulary import END, PAD, START


class _Loop(NamedTuple):
    t: jax.Array
    carries: tuple
    last_IK: jax.Array
    done_IK: jax.Array
    out: Decoded


def one_by_one(step: Step, config: config_lib.Decode, keys_I: jax.Array, captions: int = 1) -> Decoded:
    """Greedy, or sampled: so many captions of each image, `tokens_IKT`, `log_prob_IK`, `alpha_IKTP`.

    `keys_I`: what an image's captions are drawn from.
    """
    images, length = step.images, config.max_length

    def body(s: _Loop) -> _Loop:
        carries, logits_NV, alpha_IKP = step(s.carries, s.last_IK)  # N: captions of all images
        ids_V = jnp.arange(logits_NV.shape[-1])
        allowed_V = jnp.where(s.t == length - 1, ids_V == END, ids_V >= END)
        allowed_NV = jnp.where(allowed_V[None], logits_NV, -jnp.inf)
        if config.method == "greedy":
            # As argmax; but XLA's takes several times as long on a CPU.
            best_NV = allowed_NV == allowed_NV.max(-1, keepdims=True)
            chosen_N = jnp.where(best_NV, ids_V[None], step.words - 1).min(-1)
        else:
            keys_now_I = jax.vmap(lambda key: jax.random.fold_in(key, s.t))(keys_I)
            chosen_N = _draw(allowed_NV[:, : step.words], config, keys_now_I)
        chosen_IK = jnp.where(s.done_IK, PAD, chosen_N.reshape(images, captions)).astype(jnp.int32)
        log_prob_N = jnp.take_along_axis(logits_NV, chosen_IK.reshape(-1, 1), 1)[:, 0] - jax.nn.logsumexp(logits_NV, -1)
        out = Decoded(
            s.out.tokens_IT.at[..., s.t].set(chosen_IK),
            s.out.log_prob_I + jnp.where(s.done_IK, 0, log_prob_N.reshape(images, captions)),
            s.out.alpha_ITP.at[..., s.t, :].set(jnp.where(s.done_IK[..., None], 0, alpha_IKP)),
        )
        return _Loop(s.t + 1, carries, chosen_IK, s.done_IK | (chosen_IK == END), out)

    shape = images, captions
    empty = Decoded(
        jnp.full((*shape, length), PAD, jnp.int32), jnp.zeros(shape), jnp.zeros((*shape, length, step.positions))
    )
    first = _Loop(
        jnp.zeros((), jnp.int32), step.start(captions), jnp.full(shape, START, jnp.int32), jnp.zeros(shape, bool), empty
    )
    return jax.lax.while_loop(lambda s: (s.t < length) & ~s.done_IK.all(), body, first).out


def _draw(logits_NV: jax.Array, config: config_lib.Decode, keys_I: jax.Array) -> jax.Array:
    """Words [N] drawn from what temperature, top_k and top_p leave."""
    logits_NV = logits_NV / config.temperature
    if 0 < config.top_k < logits_NV.shape[-1]:
        least_N1 = jax.lax.top_k(logits_NV, config.top_k)[0][:, -1:]
        logits_NV = jnp.where(logits_NV < least_N1, -jnp.inf, logits_NV)
    if config.top_p < 1:
        logits_NV = _nucleus(logits_NV, config.top_p)
    logits_IKV = logits_NV.reshape(len(keys_I), -1, logits_NV.shape[-1])
    return jax.vmap(jax.random.categorical)(keys_I, logits_IKV).reshape(-1)


def _nucleus(logits_NV: jax.Array, top_p: float) -> jax.Array:
    """Only the fewest most probable words whose probabilities reach top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    sorted_NV = jnp.sort(jax.nn.softmax(logits_NV), descending=True)
    before_NV = jnp.cumsum(sorted_NV, -1) - sorted_NV
    least_N1 = jnp.where(before_NV < top_p, sorted_NV, jnp.inf).min(-1, keepdims=True)
    return jnp.where(jax.nn.softmax(logits_NV) < least_N1, -jnp.inf, logits_NV)
