"""`flaxcap bench input`: batches onto the devices, and nothing done with them there."""

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
from flaxcap.bench.base import Figures, Given, Work, rates, spread
from flaxcap.config import Config
from flaxcap.features import store
from flaxcap.features.shards import Split
from flaxcap.files import disk_space
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.runtime import sharding


@contextlib.contextmanager
def work(config: Config, given: Given) -> Iterator[Work]:
    """A repetition feeds the timed steps from features on the device, where they fit, and from a store on disk.

    The store was just written, so the system may have it in memory: what is measured is the way, not the disk.
    """
    plan = synthetic.plan(given.images, config)
    mesh = sharding.make_mesh()
    dispatches = synthetic.sample(plan, given.steps)
    counted = synthetic.counts(dispatches)
    with tempfile.TemporaryDirectory(prefix="flaxcap-bench-") as folder:
        written, split = _write(folder, config, given)
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

        def run(feed: Feed, dispatches: list) -> Figures:
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
            some = {name: counted[name] for name in ("images", "captions", "tokens")}
            return {
                "seconds": seconds,
                **some,
                **rates(seconds, batches=counted["steps"], **some),
                "gb_s": size / seconds / 1e9,
                "step_ms": spread(step_ms),
            }

        for feed in feeds.values():
            run(feed, dispatches[: given.warmup])

        def repeat() -> Figures:
            found = {mode: run(feed, dispatches) for mode, feed in feeds.items()}
            return {"captions_s": found["stream"]["captions_s"]} | found

        yield Work("captions_s", facts, repeat)


def _write(folder: str, config: Config, given: Given) -> tuple[float, Split]:
    """A store's split of made-up features, and GB a second of its writing. WriteError if the disk is too small."""
    size = given.images * store.bytes_an_image(given.positions, given.feature_dim, config.encoder.store_dtype)
    disk_space.check(folder, size, f"--images={given.images}", "set TMPDIR to a larger disk")
    dtype = jnp.dtype(config.encoder.store_dtype)
    source = synthetic.MadeUp(given.images, given.positions, given.feature_dim, dtype, config.seed)
    split = Split(epath.Path(folder), given.images, config.encoder.shard_images)
    begin = time.perf_counter()
    array = split.create_array(given.positions, given.feature_dim, config.encoder.store_dtype)
    for number in tqdm.trange(split.num_shards, desc="store", unit=" shards", disable=None):
        split.write(array, number, source.read(split.shard(number)), [])
    return size / (time.perf_counter() - begin) / 1e9, split
