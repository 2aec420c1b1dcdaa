"""Beam search, of any width, for a batch of images at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap import config as config_lib
from flaxcap.decoding.step import BLOCK, WORDS, Decoded, Step
from flaxcap.text.vocabulary import END, PAD, START


class _Ended(NamedTuple):
    """The best of each image's hypotheses that have ended."""

    score_I: jax.Array  # float32: what they compete by; -inf: none has ended yet
    log_prob_I: jax.Array  # float32
    tokens_IT: jax.Array  # int32
    places_IT: jax.Array  # int32: its place among the beams at each step


class _Beams(NamedTuple):
    """The search at step t: each image's hypotheses that go on, most probable first; K is the width of the beam."""

    t: jax.Array  # int32 []
    carries: tuple  # the models' states, [I, K, …]
    last_IK: jax.Array  # int32
    log_prob_IK: jax.Array  # float32; -inf: there is none in this place
    tokens_IKT: jax.Array  # int32, those so far, then <pad>
    places_IKT: jax.Array  # int32: the place that the hypothesis, or what it goes on from, had at each step
    alpha_TIKP: jax.Array  # float32, by place
    count_I: jax.Array  # int32: hypotheses that have ended
    ended: _Ended


def beam_search(step: Step, config: config_lib.Decode) -> Decoded:
    """Each image's best caption, of those that beam search finds, by log-probability / length**length_penalty.

    Wu et al. 2016 (arXiv:1609.08144), section 7, has this normalisation; <end> counts. At each step all continuations
    of an image's K hypotheses by one token are ranked. Those among the first K that are an <end> have ended; the first
    K that are words go on. An image is done when K hypotheses have ended, or when none that goes on can become better
    than the best of these: a log-probability only falls, and at best is divided by the greatest length.

    The beams are the captions of the cell: they share the memory of their image. There is one at the first step.
    """
    images, length, width = step.images, config.max_length, config.beam_width

    def normalised(log_prob: jax.Array, tokens: jax.Array | int) -> jax.Array:
        return log_prob / jnp.asarray(tokens, jnp.float32) ** config.length_penalty

    def best_ended(s: _Beams, places_IKT: jax.Array, ends_IK: jax.Array) -> _Ended:
        """The best so far, when hypotheses end now with the log-probabilities `ends_IK`; -inf: it does not."""
        best_I1 = ends_IK.argmax(-1)[:, None]
        log_prob_I = jnp.take_along_axis(ends_IK, best_I1, 1)[:, 0]
        tokens_IT = _pick(s.tokens_IKT, best_I1)[:, 0].at[:, s.t].set(END)
        now = _Ended(normalised(log_prob_I, s.t + 1), log_prob_I, tokens_IT, _pick(places_IKT, best_I1)[:, 0])
        better_I = now.score_I > s.ended.score_I
        return jax.tree.map(
            lambda new, old: jnp.where(better_I.reshape(-1, *[1] * (new.ndim - 1)), new, old), now, s.ended
        )

    def body(s: _Beams) -> _Beams:
        carries, logits_NV, alpha_IKP = step(s.carries, s.last_IK)  # N: beams of all images
        beams = s.last_IK.shape[1]
        base_IK = s.log_prob_IK - jax.nn.logsumexp(logits_NV, -1).reshape(images, beams)
        ends_IK = base_IK + logits_NV[:, END].reshape(images, beams)
        if 0 < config.no_repeat_ngram < length:
            repeats_NJ = _repeats(s.tokens_IKT, s.t, config.no_repeat_ngram).reshape(images * beams, -1)
            logits_NV = jax.vmap(lambda x, ids: x.at[ids].set(-jnp.inf))(logits_NV, repeats_NJ)
        # The K best of all words are among the K best after each hypothesis: of these alone log-probabilities are made.
        logits_NW, word_NW = _top_words(logits_NV, min(width, step.words - WORDS))
        next_IKW = base_IK[..., None] + logits_NW.reshape(images, beams, -1)
        next_IM = jnp.where(s.t == length - 1, -jnp.inf, next_IKW).reshape(images, -1)
        lacking = max(width - next_IM.shape[1], 0)  # of a single beam and few words
        next_IM = jnp.pad(next_IM, ((0, 0), (0, lacking)), constant_values=-jnp.inf)
        log_prob_IK, index_IK = jax.lax.top_k(next_IM, width)
        index_IK = jnp.minimum(index_IK, next_IM.shape[1] - lacking - 1)
        last_IK = jnp.take_along_axis(word_NW.reshape(images, -1), index_IK, 1)
        from_IK = index_IK // next_IKW.shape[-1]

        # Of equals <end> comes first: it has the least id, as in argmax.
        _, first_IK = jax.lax.top_k(jnp.concatenate([ends_IK, log_prob_IK], 1), width)
        is_first_IK = (first_IK[:, None] == jnp.arange(beams)[None, :, None]).any(-1)
        ends_IK = jnp.where(is_first_IK, ends_IK, -jnp.inf)
        places_IKT = s.places_IKT.at[:, :, s.t].set(jnp.arange(beams)[None])
        ended = best_ended(s, places_IKT, ends_IK)
        count_I = s.count_I + (ends_IK > -jnp.inf).sum(-1, dtype=jnp.int32)
        done_I = (count_I >= width) | (normalised(log_prob_IK[:, 0], length) <= ended.score_I)
        return _Beams(
            s.t + 1,
            jax.tree.map(lambda x: _pick(x, from_IK), carries),
            last_IK,
            jnp.where(done_I[:, None], -jnp.inf, log_prob_IK),
            _pick(s.tokens_IKT, from_IK).at[:, :, s.t].set(last_IK),
            _pick(places_IKT, from_IK),
            s.alpha_TIKP.at[s.t, :, :beams].set(alpha_IKP),
            count_I,
            ended,
        )

    blank_I1T = jnp.full((images, 1, length), PAD, jnp.int32)
    none_I = jnp.full(images, -jnp.inf)
    first = _Beams(
        jnp.zeros((), jnp.int32),
        step.start(1),
        jnp.full((images, 1), START, jnp.int32),
        jnp.zeros((images, 1)),
        blank_I1T,
        blank_I1T,
        jnp.zeros((length, images, width, step.positions)),
        jnp.zeros(images, jnp.int32),
        _Ended(none_I, none_I, blank_I1T[:, 0], blank_I1T[:, 0]),
    )
    last = jax.lax.while_loop(lambda s: (s.log_prob_IK > -jnp.inf).any(), body, body(first))
    found = last.ended
    # One gather of the attention that the best caption passed through, not one of all of it at every step.
    alpha_ITP = jax.vmap(lambda x, places: x[jnp.arange(length), places], (1, 0))(last.alpha_TIKP, found.places_IT)
    return Decoded(found.tokens_IT, found.log_prob_I, jnp.where((found.tokens_IT == PAD)[..., None], 0, alpha_ITP))


def _pick(x: jax.Array, index_IJ: jax.Array) -> jax.Array:
    """x[i, index[i, j]], as a gather that keeps each image on its own device."""
    return jax.vmap(lambda x, index: x[index])(x, index_IJ)


def _repeats(tokens_IKT: jax.Array, t: jax.Array, n: int) -> jax.Array:
    """The words [I, K, T - n] that would, as token t, complete a run of n tokens that is there already; else <pad>."""
    starts = tokens_IKT.shape[-1] - n
    recent = jax.lax.dynamic_slice_in_dim(tokens_IKT, t - n + 1, n - 1, 2)
    repeats = (jnp.arange(starts) <= t - n)[None, None]
    for k in range(n - 1):
        repeats &= tokens_IKT[..., k : k + starts] == recent[..., k : k + 1]
    return jnp.where(repeats, tokens_IKT[..., n - 1 : n - 1 + starts], PAD)


def _top_words(x_NV: jax.Array, k: int, block: int = BLOCK) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of the words' logits, in a third of its time on a CPU, which partially sorts every row.

    V is a multiple of the block. The k greatest are in the k blocks with the greatest maxima, or in the first, which
    holds the special tokens: only these are sorted, in order of their ids, so that of equals the first is found here
    too.
    """
    x_NSB = x_NV.reshape(len(x_NV), -1, block)
    greatest_NS = x_NSB.max(-1).at[:, 0].set(jnp.inf)
    near_NK = jnp.sort(jax.lax.top_k(greatest_NS, min(k + 1, greatest_NS.shape[1]))[1])
    near_NM = _pick(x_NSB, near_NK).reshape(len(x_NV), -1)
    values_NK, index_NK = jax.lax.top_k(near_NM[:, WORDS:], k)
    index_NK += WORDS
    return values_NK, jnp.take_along_axis(near_NK, index_NK // block, 1) * block + index_NK % block
