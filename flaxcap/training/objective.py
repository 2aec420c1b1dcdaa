"""The training objective of a microbatch: cross-entropy, and what a recipe adds to it.

Everything is a sum. The sums of microbatches and devices add up; the step divides by the batch's tokens at the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.config import Train
from flaxcap.models import output_layer
from flaxcap.models.decoder import CaptionDecoder
from flaxcap.text.vocabulary import END, PAD
from flaxcap.training import losses


class Microbatch(NamedTuple):
    """Images with their captions: a device's batch, or a part of it."""

    feats_IPF: jax.Array
    tokens_ICT: jax.Array  # int32
    weight_IC: jax.Array  # float32: of each caption in the objective
    index_I: jax.Array  # int32: of each image in its batch


class StepContext(NamedTuple):
    """Per-step context: PRNG key, fraction of training done, REINFORCE baseline."""

    key: jax.Array
    done: jax.Array  # float32 [], 0 to 1
    baseline: jax.Array  # float32 []: moving average of a caption's log-probability, in nats

    def keys(self, microbatch: Microbatch) -> jax.Array:
        """Returns a PRNG key for each image."""
        return jax.vmap(lambda i: jax.random.fold_in(self.key, i))(microbatch.index_I)


class StepSums(NamedTuple):
    """The logged sums of a microbatch."""

    sums: losses.Sums
    captions: jax.Array  # float32 []


def no_sums() -> StepSums:
    """Returns sums of nothing."""
    return StepSums(losses.no_tokens(), jnp.zeros(()))


def evaluate(decoder: CaptionDecoder, microbatch: Microbatch) -> StepSums:
    """Returns the cross-entropy alone, of every token but <start>, given the tokens before it."""
    states_TICS, _ = decoder(microbatch.feats_IPF, microbatch.tokens_ICT[..., :-1])
    return _sums(_losses(decoder, states_TICS, microbatch, 0.0), microbatch)


def objective(
    decoder: CaptionDecoder, microbatch: Microbatch, context: StepContext, config: Train
) -> tuple[jax.Array, StepSums]:
    """Returns the objective, float32 [], and what is logged.

    Args:
      decoder: bound to the parameters.
      microbatch: images and captions.
      context: of the step.
      config: the recipe.
    """
    keys_I = context.keys(microbatch)
    given_ICT = microbatch.tokens_ICT[..., :-1]
    _, captions, time = given_ICT.shape
    noise = decoder.draw_noise(keys_I, captions, time, config.dropout)
    if config.scheduled_sampling:
        share = config.scheduled_sampling * context.done
        given_ICT = _scheduled(decoder, microbatch, noise, keys_I, share)
    states_TICS, alpha_TICP = decoder(microbatch.feats_IPF, given_ICT, noise)
    found = _losses(decoder, states_TICS, microbatch, config.label_smoothing)
    real_TIC = (jnp.moveaxis(microbatch.tokens_ICT[..., 1:], 2, 0) != PAD).astype(jnp.float32)
    total = found.objective
    if config.doubly_stochastic:
        total += config.doubly_stochastic * _unevenness(alpha_TICP, real_TIC)
    nats_TIC = found.nats_M.reshape(real_TIC.shape)
    total += decoder.auxiliary_loss(noise, alpha_TICP, nats_TIC, real_TIC, context.baseline, config)
    return total, _sums(found, microbatch)


def _losses(decoder: CaptionDecoder, states_TICS: jax.Array, microbatch: Microbatch, smoothing: float) -> losses.Losses:
    # Time first, as the scan leaves the states: the targets are transposed, which are smaller.
    states_MS = states_TICS.reshape(-1, states_TICS.shape[-1])
    targets_TIC = jnp.moveaxis(microbatch.tokens_ICT[..., 1:], 2, 0)
    weight_M = jnp.broadcast_to(microbatch.weight_IC, targets_TIC.shape).reshape(-1)
    return losses.token_losses(decoder.output_weights(), states_MS, targets_TIC.reshape(-1), weight_M, smoothing)


def _sums(found: losses.Losses, microbatch: Microbatch) -> StepSums:
    return StepSums(found.sums, (microbatch.tokens_ICT[..., 0] != PAD).sum(dtype=jnp.float32))


def _unevenness(alpha_TICP: jax.Array, real_TIC: jax.Array) -> jax.Array:
    """Returns the sum of (1 - sum_t alpha_tp)²: doubly stochastic attention (Xu et al. 2015, equation 14)."""
    attention_ICP = (alpha_TICP * real_TIC[..., None]).sum(0)
    return (((1 - attention_ICP) ** 2).sum(-1) * real_TIC[0]).sum()


def _scheduled(
    decoder: CaptionDecoder, microbatch: Microbatch, noise: Any, keys_I: jax.Array, share: jax.Array
) -> jax.Array:
    """Returns the given tokens with a share of the words replaced by words that the model draws.

    Scheduled sampling (Bengio et al. 2015, arXiv:1506.03099) in two parallel passes instead of word by word
    (Duckworth et al. 2019, arXiv:1906.04331): the first pass, on the true words, draws the input of the second.
    """
    stop: Any = jax.lax.stop_gradient
    given_ICT = microbatch.tokens_ICT[..., :-1]
    states_TICS, _ = decoder(microbatch.feats_IPF, given_ICT, noise)
    weights = decoder.output_weights()

    def draw(key: jax.Array, states_TCS: jax.Array, given_CT: jax.Array) -> jax.Array:
        logits_TCV = output_layer.logits(weights, stop(states_TCS))
        is_word_11V = jnp.arange(logits_TCV.shape[-1])[None, None] > END
        logits_TCV = jnp.where(is_word_11V, logits_TCV, -jnp.inf)
        drawn_TC = jax.random.categorical(jax.random.fold_in(key, 7), logits_TCV)
        # The word drawn after token t replaces token t + 1; the first token is <start>.
        drawn_CT = jnp.roll(drawn_TC, 1, 0).T
        chosen_CT = jax.random.bernoulli(jax.random.fold_in(key, 8), share, given_CT.shape)
        chosen_CT &= (given_CT > END) & (jnp.arange(given_CT.shape[1])[None] > 0)
        return jnp.where(chosen_CT, drawn_CT, given_CT)

    return stop(jax.vmap(draw, (0, 1, 0))(keys_I, states_TICS, given_ICT))
