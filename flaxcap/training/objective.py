"""What a step minimises: the captions' cross-entropy, and what a recipe adds to it. Sums over a part of a batch.

The parts of a batch add up, on a device and over devices; the whole is divided by the batch's tokens at the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap import config as config_lib
from flaxcap.models import dropout
from flaxcap.models.cell import place
from flaxcap.models.recurrent import Captioner, Dropped
from flaxcap.text.vocabulary import END, PAD
from flaxcap.training import losses as losses_lib


class Microbatch(NamedTuple):
    """Images of a batch with their captions."""

    feats_IPF: jax.Array
    tokens_ICT: jax.Array  # int32
    weight_IC: jax.Array  # float32: of each caption in the objective
    place_I: jax.Array  # int32: of each image in its batch


class StepContext(NamedTuple):
    """Where in its run a step stands."""

    key: jax.Array  # of the step
    done: jax.Array  # float32 []: the share of the run that is done
    baseline: jax.Array  # float32 []: a usual log-probability of a caption, see `TrainState`

    def keys(self, part: Microbatch) -> jax.Array:
        """What each image of a part draws from."""
        return jax.vmap(lambda i: jax.random.fold_in(self.key, i))(part.place_I)


class StepSums(NamedTuple):
    """Float32 []."""

    sums: losses_lib.Sums
    captions: jax.Array


def nothing() -> StepSums:
    return StepSums(losses_lib.no_tokens(), jnp.zeros(()))


def evaluate(model: Captioner, part: Microbatch) -> StepSums:
    """Cross-entropy alone: each caption's tokens after its first, given those before."""
    states_TICS, _ = model(part.feats_IPF, part.tokens_ICT[..., :-1])
    return _found(_losses(model, states_TICS, part, 0.0), part)


def objective(
    model: Captioner, part: Microbatch, moment: StepContext, config: config_lib.Train
) -> tuple[jax.Array, StepSums]:
    """What the gradient is of, and what is reported."""
    keys_I = moment.keys(part)
    given_ICT = part.tokens_ICT[..., :-1]
    _, captions, time = given_ICT.shape
    dropped = dropout.dropped(model, keys_I, captions, time, part.feats_IPF.shape[1], config.dropout)
    if config.scheduled_sampling:
        share = config.scheduled_sampling * moment.done
        given_ICT = _scheduled(model, part, dropped, keys_I, share)
    states_TICS, alpha_TICP = model(part.feats_IPF, given_ICT, dropped)
    losses = _losses(model, states_TICS, part, config.label_smoothing)
    total = losses.objective
    real_TIC = (jnp.moveaxis(part.tokens_ICT[..., 1:], 2, 0) != PAD).astype(jnp.float32)
    if config.doubly_stochastic:
        total += config.doubly_stochastic * _unevenness(alpha_TICP, real_TIC)
    if model.config.attention == "hard":
        total += _reinforce(alpha_TICP, real_TIC, losses, dropped, moment, config)
    return total, _found(losses, part)


def _losses(model: Captioner, states_TICS: jax.Array, part: Microbatch, smoothing: float) -> losses_lib.Losses:
    # Time first, as the scan leaves them: the targets are turned, not the states.
    states_MS = states_TICS.reshape(-1, states_TICS.shape[-1])
    targets_TIC = jnp.moveaxis(part.tokens_ICT[..., 1:], 2, 0)
    weight_M = jnp.broadcast_to(part.weight_IC, targets_TIC.shape).reshape(-1)
    return losses_lib.token_losses(model.output_weights(), states_MS, targets_TIC.reshape(-1), weight_M, smoothing)


def _found(losses: losses_lib.Losses, part: Microbatch) -> StepSums:
    return StepSums(losses.sums, (part.tokens_ICT[..., 0] != PAD).sum(dtype=jnp.float32))


def _unevenness(alpha_TICP: jax.Array, real_TIC: jax.Array) -> jax.Array:
    """Doubly stochastic attention (Xu et al. 2015, equation 14): sum_p (1 - sum_t alpha_tp)² of each caption."""
    looked_ICP = (alpha_TICP * real_TIC[..., None]).sum(0)
    return (((1 - looked_ICP) ** 2).sum(-1) * real_TIC[0]).sum()


def _scheduled(model: Captioner, part: Microbatch, dropped: Dropped, keys_I: jax.Array, share: jax.Array) -> jax.Array:
    """The given tokens, a share of them replaced by words that the model draws there itself.

    Scheduled sampling (Bengio et al. 2015, arXiv:1506.03099), in two parallel passes instead of word by word
    (Duckworth et al. 2019, arXiv:1906.04331): the first, on the true words, draws what the second is given.
    """
    frozen: Any = jax.lax.stop_gradient
    given_ICT = part.tokens_ICT[..., :-1]
    states_TICS, _ = model(part.feats_IPF, given_ICT, dropped)

    def draw(key: jax.Array, states_TCS: jax.Array, given_CT: jax.Array) -> jax.Array:
        logits_TCV = model.logits(frozen(states_TCS))
        word_11V = jnp.arange(logits_TCV.shape[-1])[None, None] > END
        logits_TCV = jnp.where(word_11V, logits_TCV, -jnp.inf)
        drawn_TC = jax.random.categorical(jax.random.fold_in(key, 7), logits_TCV)
        # What is drawn after token t stands in the place of token t + 1; the first is <start>.
        drawn_CT = jnp.roll(drawn_TC, 1, 0).T
        chosen_CT = jax.random.bernoulli(jax.random.fold_in(key, 8), share, given_CT.shape)
        chosen_CT &= (given_CT > END) & (jnp.arange(given_CT.shape[1])[None] > 0)
        return jnp.where(chosen_CT, drawn_CT, given_CT)

    return frozen(jax.vmap(draw, (0, 1, 0))(keys_I, states_TICS, given_ICT))


def _reinforce(
    alpha_TICP: jax.Array,
    real_TIC: jax.Array,
    losses: losses_lib.Losses,
    dropped: Dropped,
    moment: StepContext,
    config: config_lib.Train,
) -> jax.Array:
    """Hard attention's part (Xu et al. 2015, equation 11): the places drawn are rewarded with the caption's
    log-probability above the usual, and the entropy of the weights is.
    """
    assert dropped.cell.gumbel_TICP is not None
    assert dropped.cell.hard_I is not None
    chosen_TICP = jax.lax.stop_gradient(place(alpha_TICP, dropped.cell.gumbel_TICP))
    log_alpha_TICP = jnp.log(jnp.maximum(alpha_TICP, 1e-20))
    log_chosen_IC = ((chosen_TICP * log_alpha_TICP).sum(-1) * real_TIC).sum(0)
    reward_IC = -losses.nats_M.reshape(real_TIC.shape).sum(0) - moment.baseline
    reward_IC = jax.lax.stop_gradient(reward_IC) * dropped.cell.hard_I[:, None] * real_TIC[0]
    entropy = -((alpha_TICP * log_alpha_TICP).sum(-1) * real_TIC).sum()
    return -config.hard_reward * (reward_IC * log_chosen_IC).sum() - config.hard_entropy * entropy
