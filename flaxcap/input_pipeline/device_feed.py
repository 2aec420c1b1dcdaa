"""Puts batches on the devices. Features stay in device memory or are streamed from the store, with the same results."""

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
    """The J batches of a dispatch, sharded over images.

    Each device has a part of the bank. Image i of batch j is row `index_JI[j, i]` of its device's part, see `rows`.
    """

    bank_NPF: jax.Array  # features; with fine-tuning images, uint8 [N, Y, X, 3]
    index_JI: jax.Array  # int32
    tokens_JICT: jax.Array  # int32
    weight_JIC: jax.Array  # float32: weight of each caption in the objective
    count: jax.Array  # int32 []: batches; the rest is padding
    frozen: Any = None  # with fine-tuning the encoder's frozen parameters


def rows(bank_NPF: jax.Array, index_I: jax.Array) -> jax.Array:
    """Returns `feats_IPF` from a device's part of the bank; uint16 are the bits of bfloat16.

    XLA:CPU gathers bfloat16 as float32 and first converts the complete bank (jaxlib 0.10). A CPU's bank is therefore
    uint16. A TPU's is not: XLA:TPU would copy a bank of uint16.
    """
    feats_IPF = bank_NPF[index_I]
    return jax.lax.bitcast_convert_type(feats_IPF, jnp.bfloat16) if bank_NPF.dtype == jnp.uint16 else feats_IPF


class Source(Protocol):
    """The features of a split, or its images; stored or synthetic.

    A source may have an attribute `block_NPF`, whose row n modulo its length is row n. Devices then fill their memory
    from the block.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, P, F], of images [N, Y, X, 3]."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `read`."""
        ...

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns rows, [len(rows), P, F]."""
        ...


class _Bits:
    """The bits of a source of bfloat16, as uint16."""

    dtype = np.dtype(np.uint16)

    def __init__(self, source: Source):
        self.shape = source.shape
        self._source = source

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._source.read(rows).view(self.dtype)


class Feed:
    """Puts the batches of a plan on a mesh. Each process handles the columns of its own devices."""

    def __init__(self, source: Source, plan: Plan, mesh: Mesh, mode: str = "auto", frozen: Any = None):
        """Loads the features that stay on the devices.

        Args:
          source: features or images of the split.
          plan: batches of the split.
          mesh: devices of the run.
          mode: "device": features stay in device memory; "stream": each dispatch reads its own; "auto": by size.
          frozen: see `Inputs`.

        Raises:
          ConfigError: the number of devices does not divide the batch.
        """
        images = plan.table_LI.shape[1]
        if images % mesh.size:
            raise ConfigError(f"--config.train.batch_images={images}: expected a multiple of the {mesh.size} devices")
        bits = source.dtype == jnp.bfloat16 and mesh.devices.flat[0].platform == "cpu"  # see `rows`
        self._source = _Bits(source) if bits else source
        self._plan, self._mesh = plan, mesh
        self._frozen = jax.device_put(frozen, replicated(mesh))
        self._width = images // mesh.size  # columns of a device
        self._devices = list(mesh.devices.flat)
        self._local = [d for d in self._devices if d.process_index == jax.process_index()]
        self._block = getattr(source, "block_NPF", None)
        self.resident = mode == "device" or (mode == "auto" and self._fits())
        if self.resident:
            self._bank = self._load()

    def __call__(self, batches: Sequence[Batch]) -> Inputs:
        """Returns the inputs of a dispatch: at most `plan.batches_per_dispatch` batches of one bucket."""
        # Padding batches give every dispatch the same shape. The step does not compute them.
        filled = [*batches, *[batches[-1]] * (self._plan.batches_per_dispatch - len(batches))]
        rows_JI = self.local_rows(filled)
        tokens_JICT = np.stack([b.tokens_ICT[self._local_columns()] for b in filled])
        if self.resident:
            parts = zip(self._local, np.split(rows_JI, len(self._local), 1), strict=True)
            index_JI = np.concatenate([np.searchsorted(self._rows(d), part) for d, part in parts], 1)
            bank = self._bank
        else:
            # Each device gets its rows of all batches, batch after batch.
            own_rows = np.stack(np.split(rows_JI[: len(batches)], len(self._local), 1))
            # The features of padding are not used, as it has no tokens, but must be finite. A process may have only
            # padding in a dispatch, so the row is taken from all columns.
            some_row = max(int(batch.rows_I.max()) for batch in batches)
            read = self._source.read(np.where(own_rows < 0, some_row, own_rows).reshape(-1))
            banks = read.reshape(len(self._local), -1, *read.shape[1:])
            missing = (len(filled) - len(batches)) * self._width
            banks = np.pad(banks, [(0, 0), (0, missing)] + [(0, 0)] * (read.ndim - 1)) if missing else banks
            bank = self._put(banks.reshape(-1, *read.shape[1:]), over_images(self._mesh))
            index_JI = np.arange(len(filled))[:, None] * self._width + np.tile(np.arange(self._width), len(self._local))
        second_axis = over_images(self._mesh, 1)
        return Inputs(
            bank,
            self._put(index_JI.astype(np.int32), second_axis),
            self._put(tokens_JICT, second_axis),
            self._put(np.ones(tokens_JICT.shape[:3], np.float32), second_axis),
            self._everywhere(np.int32(len(batches))),
            self._frozen,
        )

    def local_rows(self, batches: Sequence[Batch]) -> np.ndarray:
        """Returns `rows_JI` of this process's columns."""
        return np.stack([batch.rows_I[self._local_columns()] for batch in batches])

    def local(self, array: jax.Array) -> np.ndarray:
        """Returns this process's columns of an array that is sharded over its second axis."""
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[1].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards], 1)

    def replace(self, inputs: Inputs, tokens_JICT: np.ndarray, weight_JIC: np.ndarray) -> Inputs:
        """Returns the inputs with other captions and weights, given this process's columns of them."""
        second_axis = over_images(self._mesh, 1)
        tokens, weight = self._put(tokens_JICT, second_axis), self._put(weight_JIC, second_axis)
        return inputs._replace(tokens_JICT=tokens, weight_JIC=weight)

    @property
    def lengths(self) -> list[int]:
        """The lengths that captions are padded to."""
        return self._plan.buckets.tolist()

    def ahead(self, dispatches: Iterable[Sequence[Batch]], depth: int = 2) -> Iterator[tuple[Sequence[Batch], Inputs]]:
        """Yields the batches and inputs of each dispatch; a thread prepares the next `depth`."""
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
        """Returns the shapes and shardings of a dispatch.

        Args:
          time: tokens of a caption.
          images: images of a batch; None: those of the plan.
        """
        _, captions = self._plan.entries_UC.shape
        width = self._width if images is None else images // len(self._devices)
        rows = self._shape()[0] if self.resident else width * self._plan.batches_per_dispatch
        mesh, batches = self._mesh, (self._plan.batches_per_dispatch, width * len(self._devices))

        def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return Inputs(
            array((rows * len(self._devices), *self._source.shape[1:]), self._source.dtype, over_images(mesh)),
            array(batches, np.int32, over_images(mesh, 1)),
            array((*batches, captions, time), np.int32, over_images(mesh, 1)),
            array((*batches, captions), np.float32, over_images(mesh, 1)),
            array((), np.int32, replicated(mesh)),
            jax.tree.map(lambda x: array(x.shape, x.dtype, x.sharding), self._frozen),
        )

    def _everywhere(self, value: np.ndarray | np.generic) -> jax.Array:
        # `jax.device_put` on a sharding of several processes compares their values (jax 0.10). That is a program of its
        # own, which all processes would have to start in the same order as their steps.
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
        """Returns the shape of a device's part of the bank, with the rows of the device that needs most."""
        return (max(len(self._rows(d)) for d in self._devices), *self._source.shape[1:])

    def _fits(self) -> bool:
        """Returns whether the features take less than 60% of a device's memory. The step's need is checked later."""
        return int(np.prod(self._shape())) * self._source.dtype.itemsize < 0.6 * device_memory.capacity(self._local)

    def _load(self) -> jax.Array:
        shape = self._shape()
        parts = []
        for device in self._local:
            rows = self._rows(device)
            if self._block is not None:
                parts.append(self._repeat(self._block, np.resize(rows, shape[0]), device))
                continue
            feats_NPF = np.zeros(shape, self._source.dtype)
            for first in range(0, len(rows), 256):
                some = rows[first : first + 256]
                feats_NPF[first : first + len(some)] = self._source.read(some)
            parts.append(jax.device_put(feats_NPF, device))
        complete = (shape[0] * len(self._devices), *shape[1:])
        return jax.make_array_from_single_device_arrays(complete, over_images(self._mesh), parts)

    def _repeat(self, block: np.ndarray, rows: np.ndarray, device: Any) -> jax.Array:
        """Returns rows of a repeated block in a device's memory, without a copy in the host's."""
        numbers = (rows % len(block)).astype(np.int32)
        return _take(*jax.device_put((block.view(self._source.dtype), numbers), device))


@jax.jit
def _take(block: jax.Array, numbers: jax.Array) -> jax.Array:
    return block[numbers]
