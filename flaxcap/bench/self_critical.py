"""`flaxcap bench self_critical`: captions sampled by the device, scored by the host, and trained on by the device."""

import contextlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.bench import synthetic, train
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates
from flaxcap.config import Config
from flaxcap.training import self_critical


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times dispatches of self-critical training, and the three parts of each.

    The model is random and seldom predicts <end>, so that captions have the preset's greatest length. Those of a
    trained model are shorter.
    """
    plan = synthetic.plan(args.images, config)
    dispatches = synthetic.sample(plan, args.steps)
    dtype = jnp.dtype(config.encoder.store_dtype)
    source = synthetic.SyntheticFeatures(args.images, args.positions, args.feature_dim, dtype, config.seed)
    loop = _Loop(train.parts(config, args, plan, source), config, args.images)
    begin = time.perf_counter()
    loop.run(dispatches[:1])
    compile_s = time.perf_counter() - begin
    facts = {"captions_an_image": config.train.captions_per_image, "first_dispatch_s": compile_s}
    yield Benchmark("images_s", facts, lambda: loop.run(dispatches))


class _Loop:
    """The trainer's loop of self-critical training. It waits for each part, which the next one needs."""

    def __init__(self, of: train.TrainParts, config: Config, images: int):
        vocabulary, texts = synthetic.vocabulary(config.data), synthetic.texts(images, config.data, config.seed)
        self._feed, self._state = of.feed, of.state
        self._critical = self_critical.SelfCritical(of.bind, config, of.mesh, of.feed, vocabulary, texts)
        self._step = self_critical.make_train_step(of.bind, of.optimizer, of.schedule, of.mesh, config.train)

    def run(self, dispatches: train.Dispatches) -> Figures:
        """Trains on the dispatches. Returns times, counts, and the host's share of a dispatch."""
        spent = np.zeros(3)  # seconds: sampling, scoring, training
        tokens = captions = 0
        begin = time.perf_counter()
        for batches, inputs in self._feed.ahead(dispatches):
            clock = [time.perf_counter()]
            sampled = jax.block_until_ready(self._critical.sample(self._state, inputs))
            clock.append(time.perf_counter())
            inputs, _ = self._critical.weigh(inputs, batches, *sampled)
            clock.append(time.perf_counter())
            self._state, metrics = jax.block_until_ready(self._step(self._state, inputs))
            clock.append(time.perf_counter())
            spent += np.diff(clock)
            tokens += round(float(metrics["tokens"].sum()))
            captions += round(float(metrics["captions"].sum()))
        seconds = time.perf_counter() - begin
        images = synthetic.counts(dispatches)["images"]
        sampling, scoring, training = map(float, spent)
        return {
            "seconds": seconds,
            "images": images,
            "captions": captions,
            "tokens": tokens,
            **rates(seconds, images=images, captions=captions, tokens=tokens),
            "host_share": scoring / (sampling + scoring + training),
            "sampling_s": sampling,
            "scoring_s": scoring,
            "training_s": training,
        }
