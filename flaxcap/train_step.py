"""One step of training, and of evaluation, over a mesh of devices. No input or output here."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxcap import config as config_lib
from flaxcap import loss as loss_lib
from flaxcap.model import Captioner, Params
from flaxcap.text import PAD

Bind = Callable[[Params], Captioner]


class TrainState(NamedTuple):
    step: jax.Array  # int32 []
    params: Params  # float32
    opt_state: Any
    key: jax.Array  # root of the run's randomness; a step folds its number in


class Inputs(NamedTuple):
    """K batches on the devices, sharded over their images.

    `bank_NPF` holds features, a part on each device; those of image i of batch k are at `index_KI[k, i]` of its own
    device's part. Only the first `count` batches are meant.
    """

    bank_NPF: jax.Array
    index_KI: jax.Array  # int32
    tokens_KICT: jax.Array  # int32
    count: jax.Array  # int32 []


def make_mesh(devices: list | None = None) -> Mesh:
    """One axis, "data", over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # make_mesh's default became Explicit axes, under which emb[ids] and scan carries need sharding types.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_images(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Of an array whose axis `axis` is images."""
    return NamedSharding(mesh, P(*[None] * axis, "data"))


def learning_rate(config: config_lib.Train, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, or down a half cosine to 2% of it at `steps`, the run's last."""
    if config.schedule == "constant":
        warm = optax.linear_schedule(0, config.learning_rate, max(config.warmup_steps, 1))
        return warm if config.warmup_steps else optax.constant_schedule(config.learning_rate)
    warmup = min(config.warmup_steps, steps // 2)
    return optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, warmup, max(steps, warmup + 1), end_value=config.learning_rate / 50
    )


def make_optimizer(config: config_lib.Train, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) on clipped gradients."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.adam(schedule))


def init_state(init: Callable, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A new run's state, made in place on every device."""

    def make() -> TrainState:
        params_key, key = jax.random.split(jax.random.key(seed))
        params = init(params_key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(key))

    return jax.jit(make, out_shardings=replicated(mesh))()


def token_losses(model: Captioner, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> loss_lib.Sums:
    """Sums over the batch: each caption's tokens after its first, given those before."""
    hidden_ICTH, _ = model(feats_IPF, tokens_ICT[..., :-1])
    # Time first, as the scan leaves them: the targets are turned, not the states.
    hidden_NH = jnp.moveaxis(hidden_ICTH, 2, 0).reshape(-1, hidden_ICTH.shape[-1])
    targets_N = jnp.moveaxis(tokens_ICT[..., 1:], 2, 0).reshape(-1)
    return loss_lib.token_losses(model.output_weights(), hidden_NH, targets_N)


def microbatches(images: int, mesh: Mesh, config: config_lib.Train) -> int:
    """Equal parts that a device computes its images of a batch in.

    As few as `microbatch_images` allows. Where that is 0, on a CPU: those nearest to 16 images in ratio, so that a
    number without a good divisor does not fall apart into single images; elsewhere one.
    """
    own = images // mesh.size
    sizes = [size for size in range(1, own + 1) if own % size == 0]
    if config.microbatch_images:
        return own // max(size for size in sizes if size <= config.microbatch_images)
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return own // min(sizes, key=lambda size: abs(math.log(size / 16)))


def _on_each_device(mesh: Mesh, config: config_lib.Train, compute: Callable, zeros: Callable) -> Callable:
    """`(params, bank_NPF, index_I, tokens_ICT) -> sums` of what `compute(params, feats_IPF, tokens_ICT)` gives.

    Each device gathers from its own part of the bank and adds up its microbatches; only the sums travel.
    `zeros(params)`: of `compute`'s shape.
    """

    def local(params: Params, bank_NPF: jax.Array, index_I: jax.Array, tokens_ICT: jax.Array) -> Any:
        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            index_I, tokens_ICT = part
            return jax.tree.map(jnp.add, total, compute(params, bank_NPF[index_I], tokens_ICT)), None

        parts = microbatches(len(index_I) * mesh.size, mesh, config)
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (index_I, tokens_ICT))
        return jax.lax.psum(jax.lax.scan(add, zeros(params), split)[0], "data")

    specs = P(), P("data"), P("data"), P("data")
    # What is P() within a device's function stays its own until psum: gradients are not summed twice.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


def make_train_step(
    bind: Bind,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    config: config_lib.Train,
) -> Callable:
    """`train_step(state, inputs) -> (state, metrics)`, jitted: a step for each batch; the state is donated.

    `metrics`: {name: float32 [K]}, those of steps that were not meant are 0.
    """

    def nats(params: Params, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> tuple[jax.Array, tuple]:
        sums = token_losses(bind(params), feats_IPF, tokens_ICT)
        return sums.nats, (sums, (tokens_ICT[..., 0] != PAD).sum(dtype=jnp.float32))

    gradients = _on_each_device(
        mesh,
        config,
        jax.grad(nats, has_aux=True),
        lambda params: (jax.tree.map(jnp.zeros_like, params), (loss_lib.no_tokens(), jnp.zeros(()))),
    )

    def step(state: TrainState, bank_NPF: jax.Array, index_I: jax.Array, tokens_ICT: jax.Array) -> tuple:
        grads, (sums, captions) = gradients(state.params, bank_NPF, index_I, tokens_ICT)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = sums._asdict() | {
            "loss": sums.nats / jnp.maximum(sums.tokens, 1),
            "captions": captions,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, inputs: Inputs) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(k: jax.Array, so_far: tuple) -> tuple:
            state, metrics = so_far
            state, found = step(state, inputs.bank_NPF, inputs.index_KI[k], inputs.tokens_KICT[k])
            return state, {name: metrics[name].at[k].set(value) for name, value in found.items()}

        names = (*loss_lib.Sums._fields, "loss", "captions", "grad_norm", "learning_rate")
        empty = {name: jnp.zeros(len(inputs.index_KI)) for name in names}
        return jax.lax.fori_loop(0, inputs.count, body, (state, empty))

    return train_step


def make_eval_step(bind: Bind, mesh: Mesh, config: config_lib.Train) -> Callable:
    """`eval_step(params, inputs) -> Sums` over all the batches, jitted."""
    sums = _on_each_device(
        mesh,
        config,
        lambda params, feats_IPF, tokens_ICT: token_losses(bind(params), feats_IPF, tokens_ICT),
        lambda _: loss_lib.no_tokens(),
    )

    @jax.jit
    def eval_step(params: Params, inputs: Inputs) -> loss_lib.Sums:
        def body(k: jax.Array, total: loss_lib.Sums) -> loss_lib.Sums:
            found = sums(params, inputs.bank_NPF, inputs.index_KI[k], inputs.tokens_KICT[k])
            return jax.tree.map(jnp.add, total, found)

        return jax.lax.fori_loop(0, inputs.count, body, loss_lib.no_tokens())

    return eval_step
