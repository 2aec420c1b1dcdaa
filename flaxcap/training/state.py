"""The state of a run: everything that a step changes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxcap.models.decoder import Params
from flaxcap.runtime.sharding import replicated


class TrainState(NamedTuple):
    """The state of a run, replicated on every device."""

    step: jax.Array  # int32 []
    params: Params  # float32
    opt_state: Any
    key: jax.Array  # data of the run's PRNG key; a step folds in its number
    average: Params | None  # moving average of the parameters; None where `Train.ema` is 0
    rate: jax.Array  # float32 []: factor of the learning rate that the schedule "plateau" sets
    baseline: jax.Array  # float32 []: moving average of a caption's log-probability, in nats

    @property
    def best_params(self) -> Params:
        """The parameters to caption with: the average, if there is one."""
        return self.params if self.average is None else self.average


def init_state(
    init: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    ema: float = 0.0,
    more: Params | None = None,
) -> TrainState:
    """Returns the state of a new run, computed on every device.

    Args:
      init: makes the decoder's parameters from a PRNG key.
      optimizer: of the parameters.
      seed: of the parameters and of the run's PRNG key.
      mesh: devices of the run.
      ema: decay of the moving average of the parameters; 0: no average.
      more: parameters beside those of `init`.
    """

    def make(more: Params) -> TrainState:
        params_key, key = jax.random.split(jax.random.key(seed))
        params = init(params_key) | more
        average = jax.tree.map(jnp.copy, params) if ema else None
        step, key = jnp.zeros((), jnp.int32), jax.random.key_data(key)
        return TrainState(step, params, optimizer.init(params), key, average, jnp.ones(()), jnp.zeros(()))

    return jax.jit(make, out_shardings=replicated(mesh))(more or {})
