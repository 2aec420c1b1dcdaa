"""The learning-rate schedule and the optimizer."""

from typing import Any

import jax
import optax

from flaxcap.config import Train
from flaxcap.models.recurrent import Params


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


def make_optimizer(config: Train) -> optax.GradientTransformation:
    """Returns Adam on clipped gradients with decoupled weight decay; the step multiplies by the learning rate.

    Adam: Kingma & Ba 2015, arXiv:1412.6980. Weight decay, of matrices only: Loshchilov & Hutter 2019,
    arXiv:1711.05101.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def matrices(params: Params) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    decay = optax.add_decayed_weights(config.weight_decay, matrices) if config.weight_decay else optax.identity()
    return optax.chain(clip, optax.scale_by_adam(), decay)
