"""Greedy decoding and sampling: one token of each caption at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.config import Decode
from flaxcap.decoding.constraints import Constraints
from flaxcap.decoding.step import Step
from flaxcap.text.vocabulary import END, PAD, START


class DecodedCaptions(NamedTuple):
    """K captions of each image."""

    tokens_IKT: jax.Array  # int32
    log_prob_IK: jax.Array  # float32, in nats
    alpha_IKTP: jax.Array  # float32


class _Loop(NamedTuple):
    """The loop at token t."""

    t: jax.Array  # int32 []
    carries: tuple
    last_IK: jax.Array  # int32
    done_IK: jax.Array  # bool
    captions: DecodedCaptions


def one_by_one(
    step: Step, config: Decode, constraints: Constraints, keys_I: jax.Array, captions: int = 1
) -> DecodedCaptions:
    """Returns greedy or sampled captions.

    Args:
      step: of the decoders and images.
      config: the method, and what restricts sampling.
      constraints: on the captions.
      keys_I: a PRNG key for each image; greedy decoding ignores it.
      captions: K, captions an image.
    """
    images, length = step.images, config.max_length

    def body(s: _Loop) -> _Loop:
        carries, logits_BV, alpha_IKP = step(s.carries, s.last_IK, s.t)
        ids_V = jnp.arange(logits_BV.shape[-1])
        allowed_V = jnp.where(s.t == length - 1, ids_V == END, ids_V >= END)
        restricted_BV = constraints.restrict(logits_BV, s.captions.tokens_IKT, s.last_IK, s.t)
        allowed_BV = jnp.where(allowed_V[None], restricted_BV, -jnp.inf)
        if config.method == "greedy":
            # The result of argmax, which takes several times as long in XLA:CPU (jaxlib 0.10).
            best_BV = allowed_BV == allowed_BV.max(-1, keepdims=True)
            chosen_B = jnp.where(best_BV, ids_V[None], step.words - 1).min(-1)
        else:
            keys_now_I = jax.vmap(lambda key: jax.random.fold_in(key, s.t))(keys_I)
            chosen_B = _draw(allowed_BV[:, : step.words], config, keys_now_I)
        chosen_IK = jnp.where(s.done_IK, PAD, chosen_B.reshape(images, captions)).astype(jnp.int32)
        log_prob_B = jnp.take_along_axis(logits_BV, chosen_IK.reshape(-1, 1), 1)[:, 0] - jax.nn.logsumexp(logits_BV, -1)
        found = DecodedCaptions(
            s.captions.tokens_IKT.at[..., s.t].set(chosen_IK),
            s.captions.log_prob_IK + jnp.where(s.done_IK, 0, log_prob_B.reshape(images, captions)),
            s.captions.alpha_IKTP.at[..., s.t, :].set(jnp.where(s.done_IK[..., None], 0, alpha_IKP)),
        )
        return _Loop(s.t + 1, carries, chosen_IK, s.done_IK | (chosen_IK == END), found)

    shape = images, captions
    empty = DecodedCaptions(
        jnp.full((*shape, length), PAD, jnp.int32), jnp.zeros(shape), jnp.zeros((*shape, length, step.positions))
    )
    first = _Loop(
        jnp.zeros((), jnp.int32), step.start(captions), jnp.full(shape, START, jnp.int32), jnp.zeros(shape, bool), empty
    )
    return jax.lax.while_loop(lambda s: (s.t < length) & ~s.done_IK.all(), body, first).captions


def _draw(logits_BV: jax.Array, config: Decode, keys_I: jax.Array) -> jax.Array:
    """Returns token ids `[B]`, drawn from what temperature, top_k and top_p leave."""
    logits_BV = logits_BV / config.temperature
    if 0 < config.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if config.top_p < 1:
        logits_BV = _nucleus(logits_BV, config.top_p)
    logits_IKV = logits_BV.reshape(len(keys_I), -1, logits_BV.shape[-1])
    return jax.vmap(jax.random.categorical)(keys_I, logits_IKV).reshape(-1)


def _nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Keeps the fewest most probable words whose probabilities reach top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    sorted_BV = jnp.sort(jax.nn.softmax(logits_BV), descending=True)
    before_BV = jnp.cumsum(sorted_BV, -1) - sorted_BV
    least_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
    return jnp.where(jax.nn.softmax(logits_BV) < least_B1, -jnp.inf, logits_BV)
