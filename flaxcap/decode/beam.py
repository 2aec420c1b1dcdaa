"""Captions from a trained model, one token after the other: greedy, sampled or by beam search; batched and jitted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap import config as config_lib
from flaxcap.cell import Carry, Memory
from flaxcap.model import Captioner, Params
from flaxcap.text import END, PAD, START
from flaxcap.train_step import Bind

WORDS = END + 1  # the least id of a word: no caption holds the special tokens, but for its <end>


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


class _Ended(NamedTuple):
    """The best of each image's hypotheses that have ended."""

    score_I: jax.Array  # float32: what they compete by; -inf: none has ended yet
    log_prob_I: jax.Array  # float32
    tokens_IT: jax.Array  # int32
    places_IT: jax.Array  # int32: its place among the beams at each step


class _Beams(NamedTuple):
    """The search at step t: each image's hypotheses that go on, most probable first; K is the width of the beam."""

    t: jax.Array  # int32 []
    carry: Carry  # [I, K, H]
    last_IK: jax.Array  # int32
    log_prob_IK: jax.Array  # float32; -inf: there is none in this place
    tokens_IKT: jax.Array  # int32, those so far, then <pad>
    places_IKT: jax.Array  # int32: the place that the hypothesis, or what it goes on from, had at each step
    alpha_TIKP: jax.Array  # float32, by place
    count_I: jax.Array  # int32: hypotheses that have ended
    ended: _Ended


def make_decode(bind: Bind, config: config_lib.Decode) -> Callable[[Params, jax.Array, jax.Array], Decoded]:
    """`decode(params, feats_IPF, key) -> Decoded`, jitted; T is `config.max_length`.

    <pad>, <start> and <unk> are never chosen, and the last token is <end>. Each image is decoded as if it were
    alone: to sample, image i draws from `fold_in(key, i)`; greedy and beam search ignore the key.
    """

    @jax.jit
    def decode(params: Params, feats_IPF: jax.Array, key: jax.Array) -> Decoded:
        # Cast before the loop, not at every token.
        dtype = bind(params).dtype
        model = bind(jax.tree.map(lambda x: x.astype(dtype), params))
        memory = model.remember(feats_IPF)
        if config.method == "beam":
            return _beam_search(model, memory, config)
        return _one_by_one(model, memory, config, key)

    return decode


def _one_by_one(model: Captioner, memory: Memory, config: config_lib.Decode, key: jax.Array) -> Decoded:
    """Greedy, or sampled."""
    images, positions = memory.values_IPE.shape[:2]
    length = config.max_length

    def choose(logits_IV: jax.Array, key: jax.Array) -> jax.Array:
        if config.method == "greedy":
            # As argmax; but XLA's takes several times as long on a CPU.
            best_IV = logits_IV == logits_IV.max(-1, keepdims=True)
            return jnp.where(best_IV, jnp.arange(logits_IV.shape[-1])[None], logits_IV.shape[-1] - 1).min(-1)
        logits_IV = logits_IV / config.temperature
        if 0 < config.top_k < logits_IV.shape[-1]:
            least = jax.lax.top_k(logits_IV, config.top_k)[0][:, -1:]
            logits_IV = jnp.where(logits_IV < least, -jnp.inf, logits_IV)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(logits_IV)))
        return jax.vmap(jax.random.categorical)(keys, logits_IV)

    def body(s: _Loop) -> _Loop:
        carry, alpha_ICP, _ = model.cell(memory, s.carry, model.read(s.last_I[:, None]))
        logits_IV = model.logits(carry.hidden_ICH[:, 0])
        ids_V = jnp.arange(logits_IV.shape[-1])
        allowed_V = jnp.where(s.t == length - 1, ids_V == END, ids_V >= END)
        chosen_I = choose(jnp.where(allowed_V[None], logits_IV, -jnp.inf), jax.random.fold_in(key, s.t))
        chosen_I = jnp.where(s.done_I, PAD, chosen_I).astype(jnp.int32)
        chosen_logit_I = jnp.take_along_axis(logits_IV, chosen_I[:, None], 1)[:, 0]
        log_prob_I = chosen_logit_I - jax.nn.logsumexp(logits_IV, -1)
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


def _beam_search(model: Captioner, memory: Memory, config: config_lib.Decode) -> Decoded:
    """Each image's best caption, of those that beam search finds, by log-probability / length**length_penalty.

    Wu et al. 2016 (arXiv:1609.08144), section 7, has this normalisation; <end> counts. At each step all continuations
    of an image's K hypotheses by one token are ranked. Those among the first K that are an <end> have ended; the first
    K that are words go on. An image is done when K hypotheses have ended, or when none that goes on can become better
    than the best of these: a log-probability only falls, and at best is divided by the greatest length.

    The beams are the captions of the cell: they share the memory of their image.
    """
    images, positions = memory.values_IPE.shape[:2]
    length, width = config.max_length, config.beam_width

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
        carry, alpha_IKP, _ = model.cell(memory, s.carry, model.read(s.last_IK))
        logits_NV = model.logits(carry.hidden_ICH.reshape(images * width, -1))  # N: beams of all images
        base_IK = s.log_prob_IK - jax.nn.logsumexp(logits_NV, -1).reshape(images, width)
        ends_IK = base_IK + logits_NV[:, END].reshape(images, width)
        if 0 < config.no_repeat_ngram < length:
            repeats_NJ = _repeats(s.tokens_IKT, s.t, config.no_repeat_ngram).reshape(images * width, -1)
            logits_NV = jax.vmap(lambda x, ids: x.at[ids].set(-jnp.inf))(logits_NV, repeats_NJ)
        # The K best of all words are among the K best after each hypothesis: of these alone log-probabilities are made.
        logits_NW, word_NW = _top_k(logits_NV[:, WORDS:], min(width, logits_NV.shape[-1] - WORDS))
        next_IKW = base_IK[..., None] + logits_NW.reshape(images, width, -1)
        next_IKW = jnp.where(s.t == length - 1, -jnp.inf, next_IKW)
        log_prob_IK, index_IK = jax.lax.top_k(next_IKW.reshape(images, -1), width)
        last_IK = jnp.take_along_axis(word_NW.reshape(images, -1), index_IK, 1) + WORDS
        from_IK = index_IK // next_IKW.shape[-1]

        # Of equals <end> comes first: it has the least id, as in argmax.
        _, first_IK = jax.lax.top_k(jnp.concatenate([ends_IK, log_prob_IK], 1), width)
        is_first_IK = (first_IK[:, None] == jnp.arange(width)[None, :, None]).any(-1)
        ends_IK = jnp.where(is_first_IK, ends_IK, -jnp.inf)
        places_IKT = s.places_IKT.at[:, :, s.t].set(jnp.arange(width)[None])
        ended = best_ended(s, places_IKT, ends_IK)
        count_I = s.count_I + (ends_IK > -jnp.inf).sum(-1, dtype=jnp.int32)
        done_I = (count_I >= width) | (normalised(log_prob_IK[:, 0], length) <= ended.score_I)
        return _Beams(
            s.t + 1,
            jax.tree.map(lambda x: _pick(x, from_IK), carry),
            last_IK,
            jnp.where(done_I[:, None], -jnp.inf, log_prob_IK),
            _pick(s.tokens_IKT, from_IK).at[:, :, s.t].set(last_IK),
            _pick(places_IKT, from_IK),
            s.alpha_TIKP.at[s.t].set(alpha_IKP),
            count_I,
            ended,
        )

    blank_IKT = jnp.full((images, width, length), PAD, jnp.int32)
    none_I = jnp.full(images, -jnp.inf)
    first = _Beams(
        jnp.zeros((), jnp.int32),
        model.start(memory, width),
        jnp.full((images, width), START, jnp.int32),
        jnp.full((images, width), -jnp.inf).at[:, 0].set(0),
        blank_IKT,
        blank_IKT,
        jnp.zeros((length, images, width, positions)),
        jnp.zeros(images, jnp.int32),
        _Ended(none_I, none_I, blank_IKT[:, 0], blank_IKT[:, 0]),
    )
    last = jax.lax.while_loop(lambda s: (s.log_prob_IK > -jnp.inf).any(), body, first)
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


def _top_k(x_NV: jax.Array, k: int, block: int = 32) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, in a third of its time on a CPU, which partially sorts every row.

    The k greatest are in the k blocks with the greatest maxima: only these are sorted, in order of their ids, so that
    of equals the first is found here too.
    """
    rows, size = x_NV.shape
    extra = size % block  # these come first, and are always sorted
    if size - extra <= k * block:
        return jax.lax.top_k(x_NV, k)
    x_NSB = x_NV[:, extra:].reshape(rows, -1, block)
    near_NK = jnp.sort(jax.lax.top_k(x_NSB.max(-1), k)[1])
    near = jnp.concatenate([x_NV[:, :extra], _pick(x_NSB, near_NK).reshape(rows, -1)], 1)
    values_NK, index_NK = jax.lax.top_k(near, k)
    place_NK = index_NK - extra
    id_NK = extra + jnp.take_along_axis(near_NK, jnp.maximum(place_NK, 0) // block, 1) * block + place_NK % block
    return values_NK, jnp.where(place_NK < 0, index_NK, id_NK)
