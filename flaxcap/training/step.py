"""The train step and the eval step over a mesh of devices. Nothing here reads or writes files."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flaxcap.config import Train
from flaxcap.input_pipeline.device_feed import Inputs, rows
from flaxcap.models.decoder import Bind, Params
from flaxcap.runtime import devices as devices_lib
from flaxcap.training import objective as objective_lib
from flaxcap.training.losses import Sums
from flaxcap.training.objective import Microbatch, StepContext, StepSums
from flaxcap.training.state import TrainState

# Images of a microbatch on a CPU device. More do not stay in its cache; fewer leave its matrix products too small.
CPU_IMAGES = 16

Metrics = dict[str, jax.Array]


def microbatches(images: int, mesh: Mesh, config: Train) -> int:
    """Returns the number of equal microbatches that each device computes one after another.

    Where `microbatch_images` is set, it is the fewest that respect it. Otherwise a CPU device takes the size nearest
    to `CPU_IMAGES` in ratio, so that 17 images are not split into single ones. Other devices take one microbatch.

    Args:
      images: images of a batch, over all devices.
      mesh: devices of the run.
      config: `microbatch_images` is the most images of a microbatch; 0: automatic.
    """
    own = images // mesh.size
    sizes = [size for size in range(1, own + 1) if own % size == 0]
    if config.microbatch_images:
        return own // max(size for size in sizes if size <= config.microbatch_images)
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return own // min(sizes, key=lambda size: abs(math.log(size / CPU_IMAGES)))


def _sum_over_devices(mesh: Mesh, config: Train, compute: Callable, zeros: Callable) -> Callable:
    """Returns `total(replicated, bank_NPF, index_I, tokens_ICT, weight_IC)`, a sum over microbatches and devices.

    Each device gathers images from its own part of the bank. Devices exchange only their sums.

    Args:
      mesh: devices of the run.
      config: size of a microbatch.
      compute: `compute(replicated, microbatch)` returns the pytree that is summed.
      zeros: `zeros(replicated)` returns the same pytree of zeros.
    """

    def local(everywhere: Any, bank_NPF: jax.Array, index_I: jax.Array, *captions: jax.Array) -> Any:
        def add(total: Any, some: tuple) -> tuple[Any, None]:
            index_I, tokens_ICT, weight_IC, place_I = some
            microbatch = Microbatch(rows(bank_NPF, index_I), tokens_ICT, weight_IC, place_I)
            return jax.tree.map(jnp.add, total, compute(everywhere, microbatch)), None

        own = len(index_I)
        place_I = jax.lax.axis_index("data") * own + jnp.arange(own)
        parts = microbatches(own * mesh.size, mesh, config)
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (index_I, *captions, place_I))
        return jax.lax.psum(jax.lax.scan(add, zeros(everywhere), split)[0], "data")

    specs = P(), P("data"), P("data"), P("data"), P("data")
    # check_vma=False: gradients of replicated parameters stay each device's own until psum, which sums them once.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


def _batch(inputs: Inputs, j: jax.Array) -> tuple[jax.Array, ...]:
    return inputs.bank_NPF, inputs.index_JI[j], inputs.tokens_JICT[j], inputs.weight_JIC[j]


def _make_gradients(bind: Bind, mesh: Mesh, config: Train, encode: Callable | None) -> Callable:
    """Returns `gradients((params, context, frozen), *batch) -> (grads, StepSums)`, summed over a batch."""

    def compute(everywhere: tuple[Params, StepContext, Any], microbatch: Microbatch) -> tuple[Params, StepSums]:
        params, context, frozen = everywhere

        def loss(params: Params) -> tuple[jax.Array, StepSums]:
            encoded = microbatch
            if encode is not None:
                feats_IPF = encode(params, frozen, microbatch.feats_IPF, context.keys(microbatch))
                encoded = microbatch._replace(feats_IPF=feats_IPF)
            return objective_lib.objective(bind(params), encoded, context, config)

        return jax.grad(loss, has_aux=True)(params)

    def zeros(everywhere: tuple[Params, StepContext, Any]) -> tuple[Params, StepSums]:
        return jax.tree.map(jnp.zeros_like, everywhere[0]), objective_lib.no_sums()

    return _sum_over_devices(mesh, config, compute, zeros)


def make_train_step(
    bind: Bind,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    mesh: Mesh,
    config: Train,
    ramp_steps: int,
    encode: Callable | None = None,
) -> Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, inputs) -> (state, metrics)`, jitted; it makes one step for each batch.

    The state is donated. A step whose loss or gradient is not finite changes only `state.step`. Each of the metrics is
    float32 [J]. They are 0 at padding batches. At a skipped step they are 0 except "loss", "learning_rate" and
    "skipped".

    Args:
      bind: returns the decoder of some parameters.
      optimizer: its `update` takes the learning rate as `rate`.
      schedule: learning rate of each step.
      mesh: devices of the run.
      config: the recipe.
      ramp_steps: steps over which scheduled sampling grows to its full share.
      encode: computes features from images, see finetune.py; None: the bank holds features.
    """
    gradients = _make_gradients(bind, mesh, config, encode)

    def step(state: TrainState, frozen: Any, *batch: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        context = StepContext(key, jnp.minimum(state.step / max(ramp_steps, 1), 1.0), state.baseline)
        grads, (sums, captions) = gradients((state.params, context, frozen), *batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), grads)
        rate = jnp.asarray(schedule(state.step), jnp.float32) * state.rate
        log_prob = -sums.nats / jnp.maximum(captions, 1)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.nats) & jnp.isfinite(norm)
        update = functools.partial(_update, optimizer, config.ema, grads, rate, log_prob)
        state = jax.lax.cond(finite, update, lambda state: state, state)
        counted = sums._asdict() | {"captions": captions, "grad_norm": norm}
        metrics = {name: jnp.where(finite, value, 0) for name, value in counted.items()} | {
            "loss": sums.nats / jnp.maximum(sums.tokens, 1),
            "learning_rate": rate,
            "skipped": 1.0 - finite,
        }
        return state._replace(step=state.step + 1), metrics

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=encode and devices_lib.convolving())
    def train_step(state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        def body(j: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            state, of_step = step(state, inputs.frozen, *_batch(inputs, j))
            return state, {name: metrics[name].at[j].set(value) for name, value in of_step.items()}

        names = (*Sums._fields, "captions", "grad_norm", "loss", "learning_rate", "skipped")
        zeros = {name: jnp.zeros(len(inputs.index_JI)) for name in names}
        return jax.lax.fori_loop(0, inputs.count, body, (state, zeros))

    return train_step


def _update(
    optimizer: optax.GradientTransformationExtraArgs,
    ema: float,
    grads: Params,
    rate: jax.Array,
    log_prob: jax.Array,
    state: TrainState,
) -> TrainState:
    """Returns the state with new parameters, optimizer state, moving average and baseline.

    Args:
      optimizer: its `update` takes the learning rate as `rate`.
      ema: decay of the moving average of the parameters.
      grads: of the mean loss of a token.
      rate: float32 [], the learning rate.
      log_prob: float32 [], mean log-probability of the batch's captions, in nats.
      state: before the step.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, rate=rate)
    params: Any = optax.apply_updates(state.params, updates)
    average: Any = state.average
    if average is not None:
        # The decay starts at 0.1, so that the average forgets the initial parameters.
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(average, params, decay)  # decay * average + (1 - decay) * params
    baseline = jnp.where(state.step == 0, log_prob, 0.9 * state.baseline + 0.1 * log_prob)
    return state._replace(params=params, opt_state=opt_state, average=average, baseline=baseline)


def make_eval_step(
    bind: Bind, mesh: Mesh, config: Train, encode: Callable | None = None
) -> Callable[[Params, Inputs], Sums]:
    """Returns `eval_step(params, inputs) -> Sums` over all batches of a dispatch, jitted.

    Args:
      bind: returns the decoder of some parameters.
      mesh: devices of the run.
      config: size of a microbatch.
      encode: computes features from images, see finetune.py; None: the bank holds features.
    """

    def compute(everywhere: tuple[Params, Any], microbatch: Microbatch) -> StepSums:
        params, frozen = everywhere
        if encode is not None:
            microbatch = microbatch._replace(feats_IPF=encode(params, frozen, microbatch.feats_IPF, None))
        return objective_lib.evaluate(bind(params), microbatch)

    sum_of = _sum_over_devices(mesh, config, compute, lambda _: objective_lib.no_sums())

    @functools.partial(jax.jit, compiler_options=encode and devices_lib.convolving())
    def eval_step(params: Params, inputs: Inputs) -> Sums:
        def body(j: jax.Array, total: StepSums) -> StepSums:
            return jax.tree.map(jnp.add, total, sum_of((params, inputs.frozen), *_batch(inputs, j)))

        return jax.lax.fori_loop(0, inputs.count, body, objective_lib.no_sums()).sums

    return eval_step
