"""`flaxcap bench input`: batches sent to the devices, where nothing is computed."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from flaxcap.bench import stored, synthetic
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates, spread
from flaxcap.config import Config
from flaxcap.input_pipeline.batching import Batch
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.runtime import sharding


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times the feed with features streamed from a store on disk, and with features on the device if they fit."""
    plan = synthetic.plan(args.images, config)
    mesh = sharding.make_mesh()
    dispatches = synthetic.sample(plan, args.steps)
    with stored.split(config, args) as (split, written):
        feeds = {"stream": Feed(split, plan, mesh, "stream")}
        begin = time.perf_counter()
        resident = Feed(split, plan, mesh, "auto")
        facts: Figures = {
            "steps_per_epoch": plan.steps_per_epoch,
            "store_gb": np.prod(split.shape) * split.dtype.itemsize / 1e9,
            "write_gb_s": written,
        }
        if resident.resident:
            jax.block_until_ready(resident(dispatches[0]).bank_NPF)
            feeds["device"] = resident
            facts |= {"load_s": time.perf_counter() - begin}
        if args.warmup:
            for feed in feeds.values():
                _run(feed, dispatches[: args.warmup])

        def repeat() -> Figures:
            found = {mode: _run(feed, dispatches) for mode, feed in feeds.items()}
            return {"captions_s": found["stream"]["captions_s"]} | found

        yield Benchmark("captions_s", facts, repeat)


def _run(feed: Feed, dispatches: list[list[Batch]]) -> Figures:
    """Sends the dispatches to the devices. Returns times, counts and GB a second."""
    step_ms, size = [], 0
    begin = last = time.perf_counter()
    for batches, inputs in feed.ahead(dispatches):
        jax.block_until_ready(inputs)
        now = time.perf_counter()
        step_ms += [1e3 * (now - last) / len(batches)] * len(batches)
        last = now
        bank = () if feed.resident else (inputs.bank_NPF,)
        sent = (inputs.index_JI, inputs.tokens_JICT, inputs.weight_JIC, *bank)
        size += sum(array.nbytes for array in sent)
    seconds = last - begin
    counted = synthetic.counts(dispatches)
    some = {name: counted[name] for name in ("images", "captions", "tokens")}
    return {
        "seconds": seconds,
        **some,
        **rates(seconds, batches=counted["steps"], **some),
        "gb_s": size / seconds / 1e9,
        "step_ms": spread(step_ms),
    }
