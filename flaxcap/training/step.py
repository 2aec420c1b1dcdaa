"""One step of training, and of evaluation, over a mesh of devices. No input or output here."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flaxcap import config as config_lib
from flaxcap.input_pipeline.device_feed import Inputs, rows
from flaxcap.models.recurrent import ENCODER, Bind, Params
from flaxcap.runtime import devices as devices_lib
from flaxcap.training import objective as objective_lib
from flaxcap.training.losses import Sums
from flaxcap.training.objective import Microbatch, StepContext, StepSums
from flaxcap.training.state import TrainState

CPU_IMAGES = 16  # in one pass of a device of a CPU: more do not stay in its cache, fewer do not fill its products


def microbatches(images: int, mesh: Mesh, config: config_lib.Train) -> int:
    """Equal parts that a device computes its images of a batch in.

    As few as `microbatch_images` allows. Where that is 0, on a CPU: those nearest to `CPU_IMAGES` in ratio, so that a
    number without a good divisor does not fall apart into single images; elsewhere one.
    """
    own = images // mesh.size
    sizes = [size for size in range(1, own + 1) if own % size == 0]
    if config.microbatch_images:
        return own // max(size for size in sizes if size <= config.microbatch_images)
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return own // min(sizes, key=lambda size: abs(math.log(size / CPU_IMAGES)))


def _on_each_device(mesh: Mesh, config: config_lib.Train, compute: Callable, zeros: Callable) -> Callable:
    """`(replicated, bank_NPF, index_I, tokens_ICT, weight_IC) -> sums` of what `compute(replicated, part)` gives.

    Each device gathers from its own part of the bank and adds up its microbatches; only the sums travel.
    `zeros(replicated)`: of `compute`'s shape.
    """

    def local(everywhere: Any, bank_NPF: jax.Array, index_I: jax.Array, *captions: jax.Array) -> Any:
        def add(total: Any, some: tuple) -> tuple[Any, None]:
            index_I, tokens_ICT, weight_IC, place_I = some
            part = Microbatch(rows(bank_NPF, index_I), tokens_ICT, weight_IC, place_I)
            return jax.tree.map(jnp.add, total, compute(everywhere, part)), None

        own = len(index_I)
        place_I = jax.lax.axis_index("data") * own + jnp.arange(own)
        parts = microbatches(own * mesh.size, mesh, config)
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (index_I, *captions, place_I))
        return jax.lax.psum(jax.lax.scan(add, zeros(everywhere), split)[0], "data")

    specs = P(), P("data"), P("data"), P("data"), P("data")
    # What is P() within a device's function stays its own until psum: gradients are not summed twice.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


def _batch(inputs: Inputs, j: jax.Array) -> tuple[jax.Array, ...]:
    return inputs.bank_NPF, inputs.index_JI[j], inputs.tokens_JICT[j], inputs.weight_JIC[j]


def make_train_step(
    bind: Bind,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    config: config_lib.Train,
    last: int,
    encode: Callable | None = None,
) -> Callable:
    """`train_step(state, inputs) -> (state, metrics)`, jitted: a step for each batch; the state is donated.

    A step whose loss or gradient is not finite changes nothing but the step's number. `metrics`: {name: float32 [J]};
    those of steps that were not meant are 0, and of a skipped one all but "loss", "learning_rate" and "skipped".
    `last`: the step at which what grows during training is full-grown. `encode`: of finetune.py, where the bank
    holds pictures.
    """

    def compute(everywhere: tuple[Params, StepContext, Any], part: Microbatch) -> tuple:
        params, moment, frozen = everywhere

        def of(params: Params) -> tuple[jax.Array, StepSums]:
            seen = part
            if encode is not None:
                seen = part._replace(feats_IPF=encode(params, frozen, part.feats_IPF, moment.keys(part)))
            return objective_lib.objective(bind(params), seen, moment, config)

        return jax.grad(of, has_aux=True)(params)

    gradients = _on_each_device(
        mesh, config, compute, lambda given: (jax.tree.map(jnp.zeros_like, given[0]), objective_lib.nothing())
    )

    def step(state: TrainState, frozen: Any, *batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        moment = StepContext(key, jnp.minimum(state.step / max(last, 1), 1.0), state.baseline)
        grads, (sums, captions) = gradients((state.params, moment, frozen), *batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), grads)
        rate = jnp.asarray(schedule(state.step), jnp.float32) * state.rate
        log_prob = -sums.nats / jnp.maximum(captions, 1)

        def update(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates: Any = jax.tree.map(lambda x: -rate * x, updates)
            if ENCODER in updates:
                slower = config.finetune.learning_rate / config.learning_rate
                updates[ENCODER] = jax.tree.map(lambda x: x * slower, updates[ENCODER])
            params: Any = optax.apply_updates(state.params, updates)
            average = state.average
            if average is not None:
                # Early on, the average of few steps: the first parameters are forgotten.
                decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
                average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
            baseline = jnp.where(state.step == 0, log_prob, 0.9 * state.baseline + 0.1 * log_prob)
            return state._replace(params=params, opt_state=opt_state, average=average, baseline=baseline)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.nats) & jnp.isfinite(norm)
        state = jax.lax.cond(finite, update, lambda state: state, state)
        counted = sums._asdict() | {"captions": captions, "grad_norm": norm}
        metrics = {name: jnp.where(finite, value, 0) for name, value in counted.items()} | {
            "loss": sums.nats / jnp.maximum(sums.tokens, 1),
            "learning_rate": rate,
            "skipped": 1.0 - finite,
        }
        return state._replace(step=state.step + 1), metrics

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=encode and devices_lib.convolving())
    def train_step(state: TrainState, inputs: Inputs) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(j: jax.Array, so_far: tuple) -> tuple:
            state, metrics = so_far
            state, found = step(state, inputs.frozen, *_batch(inputs, j))
            return state, {name: metrics[name].at[j].set(value) for name, value in found.items()}

        names = (*Sums._fields, "captions", "grad_norm", "loss", "learning_rate", "skipped")
        empty = {name: jnp.zeros(len(inputs.index_JI)) for name in names}
        return jax.lax.fori_loop(0, inputs.count, body, (state, empty))

    return train_step


def make_eval_step(bind: Bind, mesh: Mesh, config: config_lib.Train, encode: Callable | None = None) -> Callable:
    """`eval_step(params, inputs) -> Sums` over all the batches, jitted."""

    def compute(everywhere: tuple[Params, Any], part: Microbatch) -> StepSums:
        params, frozen = everywhere
        if encode is not None:
            part = part._replace(feats_IPF=encode(params, frozen, part.feats_IPF, None))
        return objective_lib.evaluate(bind(params), part)

    found = _on_each_device(mesh, config, compute, lambda _: objective_lib.nothing())

    @functools.partial(jax.jit, compiler_options=encode and devices_lib.convolving())
    def eval_step(params: Params, inputs: Inputs) -> Sums:
        def body(j: jax.Array, total: StepSums) -> StepSums:
            return jax.tree.map(jnp.add, total, found((params, inputs.frozen), *_batch(inputs, j)))

        return jax.lax.fori_loop(0, inputs.count, body, objective_lib.nothing()).sums

    return eval_step
