"""A store on disk with synthetic features, for benchmarks that stream them."""

import contextlib
import tempfile
import time
from collections.abc import Iterator

import jax.numpy as jnp
from etils import epath

from flaxcap.bench import synthetic
from flaxcap.bench.base import BenchArgs
from flaxcap.config import Config
from flaxcap.features import store
from flaxcap.features.shards import Split
from flaxcap.files import disk_space
from flaxcap.runtime import progress


@contextlib.contextmanager
def split(config: Config, args: BenchArgs) -> Iterator[tuple[Split, float]]:
    """Writes synthetic features as a store's split, and deletes them at the end.

    The store is new, so the operating system may still hold it in memory. The disk itself is not measured.

    Yields:
      The split, and the GB a second of the writing.

    Raises:
      WriteError: the disk has too little space.
    """
    size = args.images * store.bytes_an_image(args.positions, args.feature_dim, config.encoder.store_dtype)
    dtype = jnp.dtype(config.encoder.store_dtype)
    source = synthetic.SyntheticFeatures(args.images, args.positions, args.feature_dim, dtype, config.seed)
    with tempfile.TemporaryDirectory(prefix="flaxcap-bench-") as folder:
        disk_space.check(folder, size, f"--images={args.images}", "set TMPDIR to a larger disk")
        found = Split(epath.Path(folder), args.images, config.encoder.shard_images)
        begin = time.perf_counter()
        array = found.create_array(args.positions, args.feature_dim, config.encoder.store_dtype)
        for number in progress.bar(range(found.num_shards), "store", "shards"):
            found.write(array, number, source.read(found.shard(number)), [])
        yield found, size / (time.perf_counter() - begin) / 1e9
