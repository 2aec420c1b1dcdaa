"""`flaxcap bench train`: the trainer's own plan, feed and step, on made-up captions and features."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flaxcap.bench import synthetic
from flaxcap.bench.base import Figures, Given, Work, rates, spread
from flaxcap.config import Config
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import device_memory, sharding
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import TrainState, init_state


@contextlib.contextmanager
def work(config: Config, given: Given) -> Iterator[Work]:
    """A repetition is the loop over the timed steps: batches made ahead, dispatched, metrics fetched at its end."""
    plan = synthetic.plan(given.images, config)
    mesh = sharding.make_mesh()
    dtype = jnp.dtype(config.encoder.store_dtype)
    source = synthetic.MadeUp(given.images, given.positions, given.feature_dim, dtype, config.seed)
    feed = Feed(source, plan, mesh, config.train.features)
    vocabulary = synthetic.vocabulary_size(config.data)
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(given.positions, given.feature_dim, vocabulary))
    last = config.train.epochs * plan.steps_per_epoch
    schedule = learning_rate(config.train, last)
    optimizer = make_optimizer(config.train)
    train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, last)
    state = init_state(init, optimizer, config.seed, mesh, config.train.ema)

    dispatches = synthetic.sample(plan, given.steps)
    compiled, compile_s = _compile(train_step, state, feed, {b[0].tokens_ICT.shape[-1] for b in dispatches})
    counted = synthetic.counts(dispatches)
    sizes = {name: counted[name] for name in ("images", "tokens")}
    flop = 3 * decoder_lib.find(config.model.name).flops(
        config.model, **sizes, positions=given.positions, features=given.feature_dim, vocabulary=vocabulary
    )  # a backward pass takes two products for each of the forward pass
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def run(dispatches: list) -> Figures:
        nonlocal state
        found: list[dict[str, jax.Array]] = []
        step_ms: list[float] = []
        begin = last = time.perf_counter()
        with jax.transfer_guard("disallow"):
            for batches, inputs in feed.ahead(dispatches):
                state, metrics = compiled[inputs.tokens_JICT.shape[-1]](state, inputs)
                found.append(metrics)
                if on_cpu:  # an accelerator would idle while the host waits
                    jax.block_until_ready(state)
                    now = time.perf_counter()
                    step_ms += [1e3 * (now - last) / len(batches)] * len(batches)
                    last = now
            jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        fetched = jax.device_get(found)
        computed = {name: round(sum(float(m[name].sum()) for m in fetched)) for name in ("captions", "tokens")}
        return {
            "seconds": seconds,
            **computed,
            **rates(seconds, **computed),
            "step_ms": {"mean": 1e3 * seconds / counted["steps"]} | (spread(step_ms) if step_ms else {}),
            "flop_s": flop / seconds,
        }

    if given.warmup:
        run(_first(dispatches, given.warmup))
    facts = {
        "steps": counted["steps"],
        "steps_per_epoch": plan.steps_per_epoch,
        "tokens_a_caption": counted["tokens"] / counted["captions"],
        "padding": plan.padding,
        "padding_of_timed": 1 - counted["tokens"] / counted["places"],
        "buckets": plan.buckets.tolist(),
        "features": "on the device" if feed.resident else "streamed",
        "gflop_a_caption": flop / counted["captions"] / 1e9,
        "compile_s": compile_s,
        "step_gb": {str(length): device_memory.needed(step) / 1e9 for length, step in sorted(compiled.items())},
    }
    yield Work("captions_s", facts, lambda: run(dispatches), config.train.matmul_dtype or config.train.dtype)


def _compile(
    train_step: Any, state: TrainState, feed: Feed, lengths: set[int]
) -> tuple[dict[int, jax.stages.Compiled], dict[str, float]]:
    """The step for each length, and the seconds that each took to compile."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    compiled, seconds = {}, {}
    for length in sorted(lengths):
        begin = time.perf_counter()
        compiled[length] = train_step.lower(shapes, feed.spec(length)).compile()
        seconds[str(length)] = time.perf_counter() - begin
    return compiled, seconds


def _first(dispatches: list, steps: int) -> list:
    """A step of each length, and then others, so many in all if these are more."""
    one_of_each = {batches[0].tokens_ICT.shape[-1]: batches[:1] for batches in dispatches}
    taken = list(one_of_each.values())
    while len(taken) < steps:
        taken.append(dispatches[len(taken) % len(dispatches)][:1])
    return taken
