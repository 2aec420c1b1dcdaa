"""Extraction: computes the features of every image of a split once, and writes them into the store."""

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxcap import config as config_lib
from flaxcap.encoders.base import ImageEncoder, Params
from flaxcap.errors import UserError
from flaxcap.features.renewal import NOTHING_KNOWN, KnownFeatures
from flaxcap.features.shards import Skipped, Split
from flaxcap.images.decode import ImageError
from flaxcap.runtime import devices as devices_lib
from flaxcap.runtime import progress

Load = Callable[[int], np.ndarray]  # row -> the image's pixels; raises ImageError
Encode = Callable[[np.ndarray], jax.Array | np.ndarray]  # a batch of them [I, ...] -> feats_IPF

CPU_IMAGES = 2  # images of a forward pass on a CPU: the default encoder's fastest number, with a pass on each core


class BadImagesError(UserError):
    """More images than allowed cannot be read."""


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
    """Returns the images of a forward pass: the preset's number, or one that suits this machine's devices."""
    devices = jax.local_devices()
    return config.batch_size or (CPU_IMAGES if devices[0].platform == "cpu" else 64) * len(devices)


def batches_at_once() -> int:
    """Returns how many batches are encoded concurrently.

    On a CPU each core encodes a batch. Elsewhere the device encodes one batch while the last one is fetched.
    """
    return devices_lib.usable_cores() if jax.local_devices()[0].platform == "cpu" else 2


def extract(
    split: Split,
    array: ts.TensorStore,
    load: Load,
    encode: Encode,
    *,
    batch_size: int,
    at_once: int,
    num_workers: int,
    max_bad_fraction: float,
    name: str,
    known: KnownFeatures = NOTHING_KNOWN,
) -> None:
    """Computes and writes the split's unfinished shards. Of several processes each takes its share.

    A thread writes a shard while the next one is computed, so two shards are in memory.

    Args:
      split: the split.
      array: of `split.create_array`.
      load: loads the image of a row. An image that cannot be read is skipped: its row stays NaN.
      encode: computes the features of a batch of loaded images.
      batch_size: images in a batch.
      at_once: batches that are encoded concurrently, each by its own thread.
      num_workers: threads that load images ahead.
      max_bad_fraction: the largest fraction of the split's images that may be skipped.
      name: the name of the progress bar.
      known: features that need not be computed.

    Raises:
      BadImagesError: more images than allowed cannot be read.
      StoreError, WriteError: a shard cannot be written.
    """
    # By the shard's number: a process that starts late finds fewer unfinished shards than the others did.
    shards = [n for n in split.unfinished() if n % jax.process_count() == jax.process_index()]
    if not shards:
        return
    to_compute = {n: known.missing(split, split.shard(n)) for n in shards}
    images = sum(map(len, to_compute.values()))
    kept = sum(len(split.shard(n)) for n in shards) - images
    skipped, begin = split.skipped(), time.perf_counter()
    with ThreadPoolExecutor(num_workers, "load") as loaders, ThreadPoolExecutor(1, "write") as writer:
        rows = itertools.chain.from_iterable(to_compute.values())
        loaded = _load_ahead(loaders, load, rows, at_once * batch_size)
        items = iter(progress.bar(loaded, name, "images", images))
        written = writer.submit(list)
        for number in shards:
            span, bad = split.shard(number), []
            good = _without_bad(itertools.islice(items, len(to_compute[number])), split, bad)
            feats_NPF = np.full((len(span), *array.shape[1:]), np.nan, array.dtype.numpy_dtype)
            known.fill(feats_NPF, split, span)
            for rows_I, feats_IPF in encode_ahead(good, encode, batch_size, at_once):
                feats_NPF[rows_I - span.start] = feats_IPF
            skipped += bad
            _check_bad(split, skipped, max_bad_fraction)
            written.result()
            written = writer.submit(split.write, array, number, feats_NPF, bad)
        written.result()
    unchanged = f"; {kept} images have not changed" if kept else ""
    print(f"{name}: {images} images, {images / (time.perf_counter() - begin):.1f} images/s{unchanged}")


def _load_ahead(
    pool: ThreadPoolExecutor, load: Load, rows: Iterator[int], ahead: int
) -> Iterator[tuple[int, np.ndarray | str]]:
    """Yields each row and its loaded image, or the reason why it cannot be read, in the order of `rows`.

    Args:
      pool: the threads that load.
      load: loads the image of a row.
      rows: the rows.
      ahead: images that are loading or loaded while the caller works.
    """

    def attempt(row: int) -> tuple[int, np.ndarray | str]:
        try:
            return row, load(row)
        except ImageError as e:
            return row, str(e)  # the exception's traceback would keep half-decoded pixels in memory

    queue = collections.deque(pool.submit(attempt, row) for row in itertools.islice(rows, ahead))
    try:
        while queue:
            done = queue.popleft()
            queue.extend(pool.submit(attempt, row) for row in itertools.islice(rows, 1))
            yield done.result()
    finally:
        for future in queue:
            future.cancel()


def _without_bad(
    items: Iterator[tuple[int, np.ndarray | str]], split: Split, bad: list[Skipped]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the images that were loaded, and appends the others to `bad`."""
    for row, found in items:
        if isinstance(found, str):
            logging.warning("%s: skipped: %s", split.rows[row].filename, found)
            bad.append(Skipped(row, split.rows[row].filename, found))
        else:
            yield row, found


def _check_bad(split: Split, skipped: list[Skipped], max_bad_fraction: float) -> None:
    if len(skipped) > max_bad_fraction * split.images:
        listed = "\n".join(f"  {s.filename}: {s.reason}" for s in skipped[:10])
        raise BadImagesError(
            f"{split.path}: {len(skipped)} of {split.images} images cannot be read, more than"
            f" --max_bad_fraction={max_bad_fraction} allows:\n{listed}"
        )


def encode_ahead(
    items: Iterator[tuple[int, np.ndarray]], encode: Encode, batch_size: int, at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows and features of one batch after another, in the order of `items`.

    Args:
      items: rows and loaded images.
      encode: computes the features of a batch.
      batch_size: images in a batch.
      at_once: batches that are encoded concurrently, each by its own thread.
    """

    def run(images: list[np.ndarray]) -> np.ndarray:
        # Copies of the last image fill the last batch: with one shape, XLA compiles once.
        filled = np.stack(images + images[-1:] * (batch_size - len(images)))
        return np.asarray(encode(filled))[: len(images)]

    with ThreadPoolExecutor(at_once, "encode") as pool:
        queue: collections.deque[tuple[np.ndarray, Future]] = collections.deque()
        while group := list(itertools.islice(items, batch_size)):
            queue.append((np.array([row for row, _ in group]), pool.submit(run, [image for _, image in group])))
            if len(queue) > at_once:  # one batch waits: a thread that becomes free encodes it at once
                rows_I, feats_IPF = queue.popleft()
                yield rows_I, feats_IPF.result()
        for rows_I, feats_IPF in queue:
            yield rows_I, feats_IPF.result()
