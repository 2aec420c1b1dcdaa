"""`flaxcap bench train`: the trainer's own plan, feed and step on synthetic captions and features."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxcap.bench import stored, synthetic
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates, spread
from flaxcap.config import Config
from flaxcap.input_pipeline.batching import Batch, Plan
from flaxcap.input_pipeline.device_feed import Feed, Source
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import device_memory, sharding
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import TrainState, init_state

Dispatches = list[list[Batch]]


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times the training loop: batches prepared ahead, steps dispatched, metrics fetched at the end.

    With `train.features=stream`, features are read from a store on disk.
    """
    if config.train.features == "stream":
        with stored.split(config, args) as (split, _):
            yield _prepared(config, args, split)
    else:
        dtype = jnp.dtype(config.encoder.store_dtype)
        yield _prepared(
            config,
            args,
            synthetic.SyntheticFeatures(args.images, args.positions, args.feature_dim, dtype, config.seed),
        )


def _prepared(config: Config, args: BenchArgs, source: Source) -> Benchmark:
    """Returns the benchmark of training on the features of `source`."""
    plan = synthetic.plan(args.images, config)
    dispatches = synthetic.sample(plan, args.steps)
    counted = synthetic.counts(dispatches)
    flop = _flop(config, args, counted)
    loop = _Loop(parts(config, args, plan, source), config)
    compile_s = loop.compile({batches[0].tokens_ICT.shape[-1] for batches in dispatches})
    if args.warmup:
        loop.run(_first(dispatches, args.warmup))

    def repeat() -> Figures:
        figures = loop.run(dispatches)
        return figures | {"flop_s": flop / figures["seconds"]}

    facts = {
        "steps": counted["steps"],
        "steps_per_epoch": plan.steps_per_epoch,
        "tokens_a_caption": counted["tokens"] / counted["captions"],
        "padding": plan.padding,
        "padding_of_timed": 1 - counted["tokens"] / counted["padded_tokens"],
        "buckets": plan.buckets.tolist(),
        "features": "on the device" if loop.feed.resident else "streamed",
        "gflop_a_caption": flop / counted["captions"] / 1e9,
        "compile_s": compile_s,
        "step_gb": {str(length): device_memory.needed(step) / 1e9 for length, step in sorted(loop.compiled.items())},
    }
    return Benchmark("captions_s", facts, repeat, config.train.matmul_dtype or config.train.dtype)


class TrainParts(NamedTuple):
    """The trainer's feed and state, and what its step is made of."""

    mesh: Mesh
    feed: Feed
    bind: decoder_lib.Bind
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    last: int  # step of the run
    state: TrainState


def parts(config: Config, args: BenchArgs, plan: Plan, source: Source) -> TrainParts:
    """Returns the parts of a run on synthetic captions.

    Args:
      config: the preset.
      args: sizes of the features.
      plan: batches of the captions.
      source: the features.
    """
    mesh = sharding.make_mesh()
    feed = Feed(source, plan, mesh, config.train.features)
    vocabulary = synthetic.vocabulary_size(config.data)
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(args.positions, args.feature_dim, vocabulary))
    last = config.train.epochs * plan.steps_per_epoch
    optimizer = make_optimizer(config.train)
    state = init_state(init, optimizer, config.seed, mesh, config.train.ema)
    return TrainParts(mesh, feed, bind, optimizer, learning_rate(config.train, last), last, state)


class _Loop:
    """The trainer's feed, state and compiled steps."""

    def __init__(self, of: TrainParts, config: Config):
        self.feed, self._state = of.feed, of.state
        self._step: Any = step_lib.make_train_step(of.bind, of.optimizer, of.schedule, of.mesh, config.train, of.last)
        self._on_cpu = of.mesh.devices.flat[0].platform == "cpu"
        self.compiled: dict[int, jax.stages.Compiled] = {}  # the step for each padded length

    def compile(self, lengths: set[int]) -> dict[str, float]:
        """Compiles the step for each padded length. Returns the seconds that each took."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._state)
        seconds = {}
        for length in sorted(lengths):
            begin = time.perf_counter()
            self.compiled[length] = self._step.lower(shapes, self.feed.spec(length)).compile()
            seconds[str(length)] = time.perf_counter() - begin
        return seconds

    def run(self, dispatches: Dispatches) -> Figures:
        """Trains on the dispatches. Returns times, and the counts that the steps computed on the device."""
        found: list[dict[str, jax.Array]] = []
        step_ms: list[float] = []
        begin = last = time.perf_counter()
        with jax.transfer_guard("disallow"):
            for batches, inputs in self.feed.ahead(dispatches):
                self._state, metrics = self.compiled[inputs.tokens_JICT.shape[-1]](self._state, inputs)
                found.append(metrics)
                if self._on_cpu:  # An accelerator would be idle while the host waits.
                    jax.block_until_ready(self._state)
                    now = time.perf_counter()
                    step_ms += [1e3 * (now - last) / len(batches)] * len(batches)
                    last = now
            jax.block_until_ready(self._state)
        seconds = time.perf_counter() - begin
        fetched = jax.device_get(found)
        computed = {name: round(sum(float(m[name].sum()) for m in fetched)) for name in ("captions", "tokens")}
        mean_ms = 1e3 * seconds / sum(map(len, dispatches))
        return {
            "seconds": seconds,
            **computed,
            **rates(seconds, **computed),
            "step_ms": {"mean": mean_ms} | (spread(step_ms) if step_ms else {}),
        }


def _flop(config: Config, args: BenchArgs, counted: dict[str, int]) -> int:
    """Returns the floating-point operations of the counted batches, at real tokens, forward and backward."""
    forward = decoder_lib.find(config.model.name).flops(
        config.model,
        images=counted["images"],
        tokens=counted["tokens"],
        positions=args.positions,
        features=args.feature_dim,
        vocabulary=synthetic.vocabulary_size(config.data),
    )
    return 3 * forward  # A backward pass takes two matrix products for each one of the forward pass.


def _first(dispatches: Dispatches, steps: int) -> Dispatches:
    """Returns one step of each length, then further steps up to `steps`."""
    one_of_each = {batches[0].tokens_ICT.shape[-1]: batches[:1] for batches in dispatches}
    taken = list(one_of_each.values())
    while len(taken) < steps:
        taken.append(dispatches[len(taken) % len(dispatches)][:1])
    return taken
