"""`flaxcap bench input`: batches sent to the devices, where nothing is computed."""

import contextlib
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from flaxcap.bench import synthetic
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates, spread
from flaxcap.config import Config
from flaxcap.features import store
from flaxcap.features.shards import Split
from flaxcap.files import disk_space
from flaxcap.input_pipeline.batching import Batch
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.runtime import sharding


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times the feed with features streamed from a store on disk, and with features on the device if they fit.

    The store is new, so the operating system may still hold it in memory. The disk itself is not measured.
    """
    plan = synthetic.plan(args.images, config)
    mesh = sharding.make_mesh()
    dispatches = synthetic.sample(plan, args.steps)
    with tempfile.TemporaryDirectory(prefix="flaxcap-bench-") as folder:
        written, split = _write(folder, config, args)
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


def _write(folder: str, config: Config, args: BenchArgs) -> tuple[float, Split]:
    """Writes synthetic features as a store's split.

    Returns:
      The GB a second of the writing, and the split.

    Raises:
      WriteError: the disk has too little space.
    """
    size = args.images * store.bytes_an_image(args.positions, args.feature_dim, config.encoder.store_dtype)
    disk_space.check(folder, size, f"--images={args.images}", "set TMPDIR to a larger disk")
    dtype = jnp.dtype(config.encoder.store_dtype)
    source = synthetic.SyntheticFeatures(args.images, args.positions, args.feature_dim, dtype, config.seed)
    split = Split(epath.Path(folder), args.images, config.encoder.shard_images)
    begin = time.perf_counter()
    array = split.create_array(args.positions, args.feature_dim, config.encoder.store_dtype)
    for number in tqdm.trange(split.num_shards, desc="store", unit=" shards", disable=None):
        split.write(array, number, source.read(split.shard(number)), [])
    return size / (time.perf_counter() - begin) / 1e9, split
