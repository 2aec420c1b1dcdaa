"""Batches onto the devices: from features held there, or streamed from the store, the same numbers either way."""

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxcap.config import ConfigError
from flaxcap.input_pipeline.batching import Batch, Plan
from flaxcap.runtime import device_memory
from flaxcap.runtime.sharding import over_images, replicated


class Inputs(NamedTuple):
    """J batches on the devices, sharded over their images.

    `bank_NPF` holds features, a part on each device; those of image i of batch j are at `index_JI[j, i]` of its own
    device's part, see `rows`. Only the first `count` batches are meant.
    """

    bank_NPF: jax.Array
    index_JI: jax.Array  # int32
    tokens_JICT: jax.Array  # int32
    weight_JIC: jax.Array  # float32: of each caption in the objective
    count: jax.Array  # int32 []
    frozen: Any = None  # parameters that the bank's rows are encoded with, where these are pictures


def rows(bank_NPF: jax.Array, index_I: jax.Array) -> jax.Array:
    """`feats_IPF` [I, P, F] of a device's part of the bank. On a CPU, uint16 are the bits of bfloat16.

    A gather of bfloat16 itself is one of float32 to XLA there, which makes all of the bank float32 for it first; for a
    TPU it would copy a bank of uint16.
    """
    found_IPF = bank_NPF[index_I]
    return jax.lax.bitcast_convert_type(found_IPF, jnp.bfloat16) if bank_NPF.dtype == jnp.uint16 else found_IPF


class Source(Protocol):
    """Where features are read from: a split of a store, or something made up."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # [N, P, F], of pictures [N, Y, X, 3]

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray: ...  # [len(rows), P, F]


class _Bits:
    """A source of bfloat16, read as the uint16 that `rows` takes for it."""

    dtype = np.dtype(np.uint16)

    def __init__(self, source: Source):
        self.shape = source.shape
        self._source = source

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._source.read(rows).view(self.dtype)


class Feed:
    """Puts batches of a plan onto a mesh. Of several processes each handles its own devices' columns."""

    def __init__(self, source: Source, plan: Plan, mesh: Mesh, mode: str = "auto", frozen: Any = None):
        """`mode`: "device" loads every image a device will need there now, "stream" reads them as they come,
        "auto" goes by size. `frozen`: of `Inputs`. ConfigError if the mesh does not divide the batch.
        """
        images = plan.table_LI.shape[1]
        if images % mesh.size:
            raise ConfigError(f"--config.train.batch_images={images}: expected a multiple of the {mesh.size} devices")
        bits = source.dtype == jnp.bfloat16 and mesh.devices.flat[0].platform == "cpu"  # see `rows`
        self._source = _Bits(source) if bits else source
        self._plan, self._mesh = plan, mesh
        self._frozen = jax.device_put(frozen, replicated(mesh))
        self._width = images // mesh.size  # columns a device
        self._devices = list(mesh.devices.flat)
        self._local = [d for d in self._devices if d.process_index == jax.process_index()]
        self.resident = mode == "device" or (mode == "auto" and self._fits())
        if self.resident:
            self._bank = self._load()

    def __call__(self, batches: Sequence[Batch]) -> Inputs:
        """At most `plan.run` batches of one bucket on the devices, to be sent there together."""
        # One shape for any number of batches: what is missing is filled up, and not computed.
        filled = [*batches, *[batches[-1]] * (self._plan.run - len(batches))]
        rows_JI = self.local_rows(filled)
        tokens_JICT = np.stack([b.tokens_ICT[self._local_columns()] for b in filled])
        if self.resident:
            parts = zip(self._local, np.split(rows_JI, len(self._local), 1), strict=True)
            index_JI = np.concatenate([np.searchsorted(self._rows(d), part) for d, part in parts], 1)
            bank = self._bank
        else:
            # Each device gets its rows of all the batches, one batch after the other.
            own_rows = np.stack(np.split(rows_JI[: len(batches)], len(self._local), 1))
            # What stands in an empty place is never looked at: it has no token. This process may have no other.
            some_row = max(int(batch.rows_I.max()) for batch in batches)
            read = self._source.read(np.where(own_rows < 0, some_row, own_rows).reshape(-1))
            banks = read.reshape(len(self._local), -1, *read.shape[1:])
            missing = (len(filled) - len(batches)) * self._width
            banks = np.pad(banks, [(0, 0), (0, missing)] + [(0, 0)] * (read.ndim - 1)) if missing else banks
            bank = self._put(banks.reshape(-1, *read.shape[1:]), over_images(self._mesh))
            index_JI = np.arange(len(filled))[:, None] * self._width + np.tile(np.arange(self._width), len(self._local))
        later = over_images(self._mesh, 1)
        return Inputs(
            bank,
            self._put(index_JI.astype(np.int32), later),
            self._put(tokens_JICT, later),
            self._put(np.ones(tokens_JICT.shape[:3], np.float32), later),
            self._everywhere(np.int32(len(batches))),
            self._frozen,
        )

    def local_rows(self, batches: Sequence[Batch]) -> np.ndarray:
        """`rows_JI` of the batches' columns that are this process's."""
        return np.stack([batch.rows_I[self._local_columns()] for batch in batches])

    def local(self, array_JI: jax.Array) -> np.ndarray:
        """This process's columns of an array that is sharded over its second axis."""
        shards = sorted(array_JI.addressable_shards, key=lambda shard: shard.index[1].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards], 1)

    def replace(self, inputs: Inputs, tokens_JICT: np.ndarray, weight_JIC: np.ndarray) -> Inputs:
        """The same images with other captions, this process's columns of them."""
        later = over_images(self._mesh, 1)
        return inputs._replace(tokens_JICT=self._put(tokens_JICT, later), weight_JIC=self._put(weight_JIC, later))

    @property
    def lengths(self) -> list[int]:
        """What captions are padded to."""
        return self._plan.buckets.tolist()

    def ahead(self, dispatches: Iterable[Sequence[Batch]], depth: int = 2) -> Iterator[tuple[Sequence[Batch], Inputs]]:
        """Each dispatch's batches and inputs, the next `depth` being made by another thread."""
        dispatches = iter(dispatches)

        def make() -> tuple[Sequence[Batch], Inputs] | None:
            batches = next(dispatches, None)
            return None if batches is None else (batches, self(batches))

        with ThreadPoolExecutor(1, "feed") as pool:
            ready = collections.deque(pool.submit(make) for _ in range(depth + 1))
            try:
                while (made := ready.popleft().result()) is not None:
                    ready.append(pool.submit(make))
                    yield made
            finally:
                for future in ready:
                    future.cancel()

    def spec(self, time: int, images: int | None = None) -> Inputs:
        """The shapes of a dispatch padded to `time` tokens, for this plan's batch or one of other size."""
        _, captions = self._plan.entries_UC.shape
        width = self._width if images is None else images // len(self._devices)
        rows = self._shape()[0] if self.resident else width * self._plan.run
        mesh, places = self._mesh, (self._plan.run, width * len(self._devices))

        def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return Inputs(
            array((rows * len(self._devices), *self._source.shape[1:]), self._source.dtype, over_images(mesh)),
            array(places, np.int32, over_images(mesh, 1)),
            array((*places, captions, time), np.int32, over_images(mesh, 1)),
            array((*places, captions), np.float32, over_images(mesh, 1)),
            array((), np.int32, replicated(mesh)),
            jax.tree.map(lambda x: array(x.shape, x.dtype, x.sharding), self._frozen),
        )

    def _everywhere(self, value: np.ndarray | np.generic) -> jax.Array:
        # Put on one device after the other: JAX's own way compares the processes' values, which is one more program
        # that they would have to start in the same order as their steps.
        copies = [jax.device_put(value, device) for device in self._local]
        return jax.make_array_from_single_device_arrays(value.shape, replicated(self._mesh), copies)

    def _put(self, local: Any, sharding: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, local)

    @functools.cache  # noqa: B019
    def _local_columns(self) -> np.ndarray:
        return np.concatenate([self._columns(device) for device in self._local])

    def _columns(self, device: Any) -> np.ndarray:
        first = self._devices.index(device) * self._width
        return np.arange(first, first + self._width)

    @functools.cache  # noqa: B019  (a feed lives as long as its run)
    def _rows(self, device: Any) -> np.ndarray:
        columns = self._columns(device)
        return self._plan.column_rows(columns[0], columns[-1] + 1)

    def _shape(self) -> tuple[int, ...]:
        """Of a device's part of the bank: as many rows as the device that needs most."""
        return (max(len(self._rows(d)) for d in self._devices), *self._source.shape[1:])

    def _fits(self) -> bool:
        """Whether features leave enough of a device for the step itself, which is checked once it is compiled."""
        return int(np.prod(self._shape())) * self._source.dtype.itemsize < 0.6 * device_memory.capacity(self._local)

    def _load(self) -> jax.Array:
        shape = self._shape()
        parts = []
        for device in self._local:
            rows = self._rows(device)
            feats_NPF = np.zeros(shape, self._source.dtype)
            for first in range(0, len(rows), 256):
                some = rows[first : first + 256]
                feats_NPF[first : first + len(some)] = self._source.read(some)
            parts.append(jax.device_put(feats_NPF, device))
        whole = (shape[0] * len(self._devices), *shape[1:])
        return jax.make_array_from_single_device_arrays(whole, over_images(self._mesh), parts)
