"""The learning-rate schedule and the optimizer."""

from typing import Any

import jax
import optax

from flaxcap.config import Train
from flaxcap.models.decoder import ENCODER, Params


def learning_rate(config: Train, steps: int, cider_steps: int = 0) -> optax.Schedule:
    """Returns the learning rate of each step.

    Cross-entropy training warms up linearly to its peak. The rate then stays there, or decays along a half cosine to
    2% of the peak. Self-critical training has a peak of its own and no warm-up. The schedule "plateau" is constant
    here: `TrainState.rate` holds the factor that follows validation.

    Args:
      config: peaks, warm-up and schedule.
      steps: steps of cross-entropy training.
      cider_steps: steps of self-critical training, which come after these.
    """
    warmup = min(config.warmup_steps, steps // 2)
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0, config.learning_rate, warmup, max(steps, warmup + 1), end_value=config.learning_rate / 50
        )
    elif config.warmup_steps:
        schedule = optax.linear_schedule(0, config.learning_rate, config.warmup_steps)
    else:
        schedule = optax.constant_schedule(config.learning_rate)
    if not cider_steps:
        return schedule
    later = optax.constant_schedule(config.cider_learning_rate)
    if config.schedule == "cosine":
        later = optax.cosine_decay_schedule(config.cider_learning_rate, cider_steps, alpha=1 / 50)
    return optax.join_schedules([schedule, later], [steps])


def make_optimizer(config: Train) -> optax.GradientTransformationExtraArgs:
    """Returns Adam on clipped gradients, with decoupled weight decay; its `update` takes the learning rate as `rate`.

    Adam: Kingma & Ba 2015, arXiv:1412.6980. Weight decay, of matrices only: Loshchilov & Hutter 2019,
    arXiv:1711.05101. Fine-tuning scales the updates of the encoder to its own learning rate.
    """

    def matrices(params: Params) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    def labels(params: Params) -> dict[str, str]:
        return {name: "encoder" if name == ENCODER else "decoder" for name in params}

    # `identity` keeps the structure of the state, so that a run resumes with another weight_decay or clip_norm.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    steps = [clip, optax.scale_by_adam(), optax.masked(decay, matrices), _scale_by_rate()]
    if config.finetune.block:
        encoder = optax.scale(config.finetune.learning_rate / config.learning_rate)
        steps.append(optax.partition({"encoder": encoder, "decoder": optax.identity()}, labels))
    return optax.chain(*steps)


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that multiplies updates by `-rate`, an argument of `update`."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: -extra["rate"] * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
