"""Beam search of any width, for a batch of images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.config import Decode
from flaxcap.decoding.constraints import Constraints
from flaxcap.decoding.step import BLOCK, FIRST_WORD, Decoded, Step
from flaxcap.text.vocabulary import END, PAD, START


class _Ended(NamedTuple):
    """The best ended hypothesis of each image."""

    score_I: jax.Array  # float32: normalised log-probability; -inf: none has ended
    log_prob_I: jax.Array  # float32
    tokens_IT: jax.Array  # int32
    ranks_IT: jax.Array  # int32: the rank of the hypothesis, or of its prefix, at each step


class _Beams(NamedTuple):
    """The search at step t: K open hypotheses of each image, most probable first."""

    t: jax.Array  # int32 []
    carries: tuple  # of the decoders; leaves [I, K, ...]
    last_IK: jax.Array  # int32
    log_prob_IK: jax.Array  # float32; -inf: no hypothesis has this rank
    tokens_IKT: jax.Array  # int32: <pad> from t on
    ranks_IKT: jax.Array  # int32: the rank of the hypothesis, or of its prefix, at each step
    alpha_TIKP: jax.Array  # float32, by rank
    count_I: jax.Array  # int32: ended hypotheses
    ended: _Ended


def beam_search(step: Step, config: Decode, constraints: Constraints) -> Decoded:
    """Returns each image's best caption by log-probability / length ** length_penalty.

    Wu et al. 2016 (arXiv:1609.08144), section 7, use this normalisation; <end> counts as a token. Each step ranks all
    continuations of an image's K hypotheses by one token. An <end> among the first K ends its hypothesis. The first K
    words continue theirs. An image is done when K hypotheses have ended, or when no open hypothesis can score higher
    than the best ended one: a log-probability only falls, and at best it is divided by the greatest length.

    The hypotheses take the place of an image's captions: they share its memory. The first step has one.

    Args:
      step: of the decoders and images.
      config: the width and the length penalty.
      constraints: on the captions.
    """
    images, length, width = step.images, config.max_length, config.beam_width

    def normalised(log_prob: jax.Array, tokens: jax.Array | int) -> jax.Array:
        return log_prob / jnp.asarray(tokens, jnp.float32) ** config.length_penalty

    def best_ended(s: _Beams, ranks_IKT: jax.Array, ends_IK: jax.Array) -> _Ended:
        """Returns the best so far. `ends_IK`: log-probabilities of hypotheses that end now; -inf: does not end."""
        best_I1 = ends_IK.argmax(-1)[:, None]
        log_prob_I = jnp.take_along_axis(ends_IK, best_I1, 1)[:, 0]
        tokens_IT = _pick(s.tokens_IKT, best_I1)[:, 0].at[:, s.t].set(END)
        now = _Ended(normalised(log_prob_I, s.t + 1), log_prob_I, tokens_IT, _pick(ranks_IKT, best_I1)[:, 0])
        better_I = now.score_I > s.ended.score_I
        return jax.tree.map(
            lambda new, old: jnp.where(better_I.reshape(-1, *[1] * (new.ndim - 1)), new, old), now, s.ended
        )

    def body(s: _Beams) -> _Beams:
        carries, logits_BV, alpha_IKP = step(s.carries, s.last_IK, s.t)
        beams = s.last_IK.shape[1]
        base_IK = s.log_prob_IK - jax.nn.logsumexp(logits_BV, -1).reshape(images, beams)
        logits_BV = constraints.restrict(logits_BV, s.tokens_IKT, s.last_IK, s.t)
        ends_IK = base_IK + logits_BV[:, END].reshape(images, beams)
        # The K best of all words are among the K best after each hypothesis: the others need no log-probability.
        top_logits, top_words = _top_words(logits_BV, min(width, step.words - FIRST_WORD))
        top_log_probs = base_IK[..., None] + top_logits.reshape(images, beams, -1)
        candidates = jnp.where(s.t == length - 1, -jnp.inf, top_log_probs).reshape(images, -1)
        lacking = max(width - candidates.shape[1], 0)  # with one hypothesis and few words
        candidates = jnp.pad(candidates, ((0, 0), (0, lacking)), constant_values=-jnp.inf)
        log_prob_IK, index_IK = jax.lax.top_k(candidates, width)
        index_IK = jnp.minimum(index_IK, candidates.shape[1] - lacking - 1)
        last_IK = jnp.take_along_axis(top_words.reshape(images, -1), index_IK, 1)
        from_IK = index_IK // top_log_probs.shape[-1]

        # Among equals <end> comes first, as in argmax: it has the least id.
        _, first_IK = jax.lax.top_k(jnp.concatenate([ends_IK, log_prob_IK], 1), width)
        is_first_IK = (first_IK[:, None] == jnp.arange(beams)[None, :, None]).any(-1)
        ends_IK = jnp.where(is_first_IK, ends_IK, -jnp.inf)
        ranks_IKT = s.ranks_IKT.at[:, :, s.t].set(jnp.arange(beams)[None])
        ended = best_ended(s, ranks_IKT, ends_IK)
        count_I = s.count_I + (ends_IK > -jnp.inf).sum(-1, dtype=jnp.int32)
        done_I = (count_I >= width) | (normalised(log_prob_IK[:, 0], length) <= ended.score_I)
        return _Beams(
            s.t + 1,
            jax.tree.map(lambda x: _pick(x, from_IK), carries),
            last_IK,
            jnp.where(done_I[:, None], -jnp.inf, log_prob_IK),
            _pick(s.tokens_IKT, from_IK).at[:, :, s.t].set(last_IK),
            _pick(ranks_IKT, from_IK),
            s.alpha_TIKP.at[s.t, :, :beams].set(alpha_IKP),
            count_I,
            ended,
        )

    blank_IKT = jnp.full((images, 1, length), PAD, jnp.int32)
    none_I = jnp.full(images, -jnp.inf)
    first = _Beams(
        jnp.zeros((), jnp.int32),
        step.start(1),
        jnp.full((images, 1), START, jnp.int32),
        jnp.zeros((images, 1)),
        blank_IKT,
        blank_IKT,
        jnp.zeros((length, images, width, step.positions)),
        jnp.zeros(images, jnp.int32),
        _Ended(none_I, none_I, blank_IKT[:, 0], blank_IKT[:, 0]),
    )
    last = jax.lax.while_loop(lambda s: (s.log_prob_IK > -jnp.inf).any(), body, body(first))
    found = last.ended
    # One gather along the path of the best hypothesis. The search itself moves no attention weights.
    alpha_ITP = jax.vmap(lambda x, ranks: x[jnp.arange(length), ranks], (1, 0))(last.alpha_TIKP, found.ranks_IT)
    return Decoded(found.tokens_IT, found.log_prob_I, jnp.where((found.tokens_IT == PAD)[..., None], 0, alpha_ITP))


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[i, index[i, j]], as a gather that keeps each image on its own device."""
    return jax.vmap(lambda x, index: x[index])(x, index)


def _top_words(x_BV: jax.Array, k: int, block: int = BLOCK) -> tuple[jax.Array, jax.Array]:
    """Returns `jax.lax.top_k` of the words' logits, values and ids, in a third of its time on a CPU (jaxlib 0.10).

    V is a multiple of the block. The k greatest are in the k blocks with the greatest maxima, or in the first block,
    which holds the special tokens. Only these blocks are sorted, in the order of their ids, so that the first among
    equals is found here too.
    """
    blocks = x_BV.reshape(len(x_BV), -1, block)
    greatest = blocks.max(-1).at[:, 0].set(jnp.inf)
    near = jnp.sort(jax.lax.top_k(greatest, min(k + 1, greatest.shape[1]))[1])
    values = _pick(blocks, near).reshape(len(x_BV), -1)
    values, index = jax.lax.top_k(values[:, FIRST_WORD:], k)
    index += FIRST_WORD
    return values, jnp.take_along_axis(near, index // block, 1) * block + index % block
