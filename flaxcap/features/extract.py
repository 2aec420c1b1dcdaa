"""Extraction: every picture of a split through the frozen encoder, once, into the store."""

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxcap import config as config_lib
from flaxcap.encoders.base import ImageEncoder, Params
from flaxcap.errors import UserError
from flaxcap.features.shards import Skipped, Split
from flaxcap.images.decode import ImageError
from flaxcap.runtime import devices as devices_lib

Encode = Callable[[np.ndarray], jax.Array | np.ndarray]

CPU_IMAGES = 2  # in one forward pass: quickest, with as many passes at once as there are cores


class BadImagesError(UserError):
    """More pictures than allowed cannot be read."""


def make_encode(encoder: ImageEncoder, params: Params, config: config_lib.Encoder, *, many: bool) -> Encode:
    """Returns `encode(images_IYX3 uint8) -> feats_IPF`, jitted, on this process's devices. Threads may share it.

    The images are sharded over the devices if their number is a multiple of the devices'.

    Args:
      encoder: of the preset.
      params: of `ImageEncoder.load`.
      config: `dtype` of the arithmetic, `store_dtype` of the result.
      many: many images will be encoded, so that some seconds of compilation pay.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    dtype, store_dtype = jnp.dtype(config.dtype), jnp.dtype(config.store_dtype)
    platform = mesh.devices.flat[0].platform
    params = encoder.inference_params(params, platform=platform, dtype=dtype, many=many)
    params = jax.device_put(params, NamedSharding(mesh, P()))

    def forward(params: Params, images_IYX3: jax.Array) -> jax.Array:
        return encoder.apply(params, images_IYX3, dtype).astype(store_dtype)

    run = jax.jit(forward, compiler_options=devices_lib.convolving())

    def encode(images_IYX3: np.ndarray) -> jax.Array:
        spec = P("data") if len(images_IYX3) % mesh.size == 0 else P()
        return run(params, jax.device_put(images_IYX3, NamedSharding(mesh, spec)))

    return encode


def batch_size(config: config_lib.Encoder) -> int:
    """Images a forward pass: the preset's, or what suits this machine's devices."""
    devices = jax.local_devices()
    return config.batch_size or (CPU_IMAGES if devices[0].platform == "cpu" else 64) * len(devices)


def batches_at_once() -> int:
    """How many are encoded side by side: as many as a CPU has cores; else the next while the last one is fetched."""
    return devices_lib.usable_cores() if jax.local_devices()[0].platform == "cpu" else 2


def extract(
    split: Split,
    load: Callable[[int], np.ndarray],
    encode: Encode,
    *,
    batch_size: int,
    at_once: int,
    positions: int,
    feature_dim: int,
    dtype: str,
    num_workers: int,
    max_bad_fraction: float,
    name: str,
) -> None:
    """Writes the split's unfinished shards; of several processes each takes its share of them.

    `load(row)` gives a picture's pixels, or raises ImageError: then its row stays empty and is listed as skipped.
    `num_workers` threads load ahead, `at_once` encode a batch each, and a shard is written and its checksum taken while
    the next one is made: two shards are held in memory. BadImagesError as soon as more than `max_bad_fraction` of the
    split is skipped.
    """
    array = split.create_array(positions, feature_dim, dtype)
    # By number, not by place in the list: a process may ask later, when others have finished some of theirs.
    shards = [n for n in split.unfinished() if n % jax.process_count() == jax.process_index()]
    if not shards:
        return
    skipped = split.skipped()
    images = sum(len(split.shard(n)) for n in shards)
    begin = time.perf_counter()
    written: Future | None = None
    with ThreadPoolExecutor(num_workers, "load") as pool, ThreadPoolExecutor(1, "write") as writer:
        rows = itertools.chain.from_iterable(split.shard(n) for n in shards)
        loaded = _load_ahead(pool, load, rows, at_once * batch_size)
        bar = tqdm.tqdm(loaded, name, total=images, unit=" images", disable=None)
        items = iter(bar)
        for number in shards:
            span = split.shard(number)
            feats_NPF = np.full((len(span), positions, feature_dim), np.nan, array.dtype.numpy_dtype)
            bad: list[Skipped] = []
            good = _without_bad(itertools.islice(items, len(span)), split, bad)
            for rows_I, feats_IPF in encode_ahead(good, encode, batch_size, at_once):
                feats_NPF[rows_I - span.start] = feats_IPF
            skipped += bad
            if len(skipped) > max_bad_fraction * split.images:
                listed = "\n".join(f"  {s.filename}: {s.reason}" for s in skipped[:10])
                raise BadImagesError(
                    f"{split.path}: {len(skipped)} of {split.images} pictures cannot be read, more than"
                    f" --max_bad_fraction={max_bad_fraction} allows:\n{listed}"
                )
            if written is not None:
                written.result()
            written = writer.submit(split.write, array, number, feats_NPF, bad)
        if written is not None:
            written.result()
    print(f"{name}: {images} images, {images / (time.perf_counter() - begin):.1f} images/s")


def _load_ahead(
    pool: ThreadPoolExecutor, load: Callable[[int], np.ndarray], rows: Iterator[int], ahead: int
) -> Iterator[tuple[int, np.ndarray | str]]:
    """(row, what was loaded or why not), in order, `ahead` of them under way."""

    def attempt(row: int) -> tuple[int, np.ndarray | str]:
        try:
            return row, load(row)
        except ImageError as e:
            return row, str(e)  # the exception itself would hold on to half-decoded pixels

    under_way = collections.deque(pool.submit(attempt, row) for row in itertools.islice(rows, ahead))
    try:
        while under_way:
            done = under_way.popleft()
            under_way.extend(pool.submit(attempt, row) for row in itertools.islice(rows, 1))
            yield done.result()
    finally:
        for future in under_way:
            future.cancel()


def _without_bad(
    items: Iterator[tuple[int, np.ndarray | str]], split: Split, bad: list[Skipped]
) -> Iterator[tuple[int, np.ndarray]]:
    """The pictures that were loaded; the others are put into `bad`."""
    for row, found in items:
        if isinstance(found, str):
            logging.warning("%s: skipped: %s", split.rows[row].filename, found)
            bad.append(Skipped(row, split.rows[row].filename, found))
        else:
            yield row, found


def encode_ahead(
    items: Iterator[tuple[int, np.ndarray]], encode: Encode, batch_size: int, at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, their features), in order: of so many batches at once, each by a thread of its own, and one that waits."""

    def run(images: list[np.ndarray]) -> np.ndarray:
        # The last batch is filled up with its last picture: one shape, one compilation.
        filled = np.stack(images + images[-1:] * (batch_size - len(images)))
        return np.asarray(encode(filled))[: len(images)]

    with ThreadPoolExecutor(at_once, "encode") as pool:
        under_way: collections.deque[tuple[np.ndarray, Future]] = collections.deque()
        while group := list(itertools.islice(items, batch_size)):
            under_way.append((np.array([row for row, _ in group]), pool.submit(run, [image for _, image in group])))
            if len(under_way) > at_once:
                rows_I, feats_IPF = under_way.popleft()
                yield rows_I, feats_IPF.result()
        for rows_I, feats_IPF in under_way:
            yield rows_I, feats_IPF.result()
