"""One step of training, and of evaluation, over a mesh of devices. No input or output here."""

import functools
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
    """A batch on the devices, sharded over its images.

    `bank_NPF` holds features, a part on each device; image i's are those at `index_I[i]` of its own device's part.
    """

    bank_NPF: jax.Array
    index_I: jax.Array  # int32
    tokens_ICT: jax.Array  # int32


def make_mesh(devices: list | None = None) -> Mesh:
    """One axis, "data", over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # make_mesh's default became Explicit axes, under which emb[ids] and scan carries need sharding types.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_images(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P("data"))


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


def token_losses(model: Captioner, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the batch, each float32 []: cross-entropy (nats), tokens that count, tokens guessed right."""
    hidden_ICTH, _ = model(feats_IPF, tokens_ICT[..., :-1])
    weights = {name: {"kernel": layer.kernel[...], "bias": layer.bias[...]} for name, layer in (("head", model.head), ("vocabulary", model.vocabulary))}
    return loss_lib.token_losses(weights, hidden_ICTH.reshape(-1, hidden_ICTH.shape[-1]), tokens_ICT[..., 1:].reshape(-1))


def make_train_step(
    bind: Bind, optimizer: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh, micro: int = 16
) -> Callable:
    """`train_step(state, inputs) -> (state, metrics)`, jitted; the state is donated."""

    def nats(params: Params, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> tuple[jax.Array, loss_lib.Sums]:
        sums = token_losses(bind(params), feats_IPF, tokens_ICT)
        return sums.nats, sums

    def gradients(params: Params, inputs: Inputs) -> tuple[Params, loss_lib.Sums]:
        """On one device."""
        images = len(inputs.index_I)
        parts = max(1, images // micro)

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            index_I, tokens_ICT = part
            found = jax.grad(nats, has_aux=True)(params, inputs.bank_NPF[index_I], tokens_ICT)
            return jax.tree.map(jnp.add, total, found), None

        zeros = jax.tree.map(jnp.zeros_like, params), loss_lib.Sums(*[jnp.zeros(())] * 3)
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (inputs.index_I, inputs.tokens_ICT))
        return jax.lax.psum(jax.lax.scan(add, zeros, split)[0], "data")

    everywhere = jax.shard_map(gradients, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, inputs: Inputs) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = everywhere(state.params, inputs)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = sums._asdict() | {
            "loss": sums.nats / jnp.maximum(sums.tokens, 1),
            "captions": (inputs.tokens_ICT[..., 0] != PAD).sum(),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_eval_step(bind: Bind, mesh: Mesh) -> Callable:
    """`eval_step(params, inputs) -> Sums` over the batch, jitted."""

    def sums(params: Params, inputs: Inputs) -> loss_lib.Sums:
        found = token_losses(bind(params), inputs.bank_NPF[inputs.index_I], inputs.tokens_ICT)
        return jax.lax.psum(found, "data")

    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False))
