"""Batches onto the devices: from features held there, or streamed from the store, the same numbers either way."""

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxcap import store
from flaxcap.batches import Batch, Plan
from flaxcap.config import ConfigError
from flaxcap.train_step import Inputs, over_images


class Feed:
    """Puts batches of a plan onto a mesh. Of several processes each handles its own devices' columns."""

    def __init__(self, split: store.Split, plan: Plan, mesh: Mesh, mode: str = "auto"):
        """`mode`: "device" loads every image a device will need there now, "stream" reads them as they come,
        "auto" goes by size. ConfigError if the mesh does not divide the batch.
        """
        images = plan.table_SI.shape[1]
        if images % mesh.size:
            raise ConfigError(f"--config.train.batch_images={images}: expected a multiple of the {mesh.size} devices")
        self._split, self._plan, self._sharding = split, plan, over_images(mesh)
        self._width = images // mesh.size  # columns a device
        self._devices = list(mesh.devices.flat)
        self._local = [d for d in self._devices if d.process_index == jax.process_index()]
        self.resident = mode == "device" or (mode == "auto" and self._fits())
        if self.resident:
            self._bank = self._load()

    def __call__(self, batch: Batch) -> Inputs:
        """This batch on the devices; `batch.rows_I` are those of the plan's columns."""
        columns = np.concatenate([self._columns(d) for d in self._local])
        rows = batch.rows_I[columns]
        put = functools.partial(jax.make_array_from_process_local_data, self._sharding)
        if self.resident:
            parts = zip(self._local, np.split(rows, len(self._local)), strict=True)
            index = np.concatenate([np.searchsorted(self._rows(d), part) for d, part in parts])
            bank = self._bank
        else:
            index = np.tile(np.arange(self._width), len(self._local))
            # What stands in an empty place is never looked at: it has no token.
            bank = put(self._split.read(np.where(rows < 0, batch.rows_I.max(), rows)))
        return Inputs(bank, put(index.astype(np.int32)), put(batch.tokens_ICT[columns]))

    def ahead(self, batches: Iterable[Batch], depth: int = 2) -> Iterator[Inputs]:
        """The batches one after the other, the next `depth` being made ready by another thread."""
        batches = iter(batches)
        with ThreadPoolExecutor(1, "feed") as pool:
            ready = collections.deque()
            try:
                while True:
                    while len(ready) <= depth and (batch := next(batches, None)) is not None:
                        ready.append(pool.submit(self, batch))
                    if not ready:
                        return
                    yield ready.popleft().result()
            finally:
                for future in ready:
                    future.cancel()

    def _columns(self, device: Any) -> np.ndarray:
        first = self._devices.index(device) * self._width
        return np.arange(first, first + self._width)

    @functools.cache  # noqa: B019  (a feed lives as long as its run)
    def _rows(self, device: Any) -> np.ndarray:
        columns = self._columns(device)
        return self._plan.column_rows(columns[0], columns[-1] + 1)

    def _shape(self) -> tuple[int, ...]:
        """Of a device's part of the bank: as many rows as the device that needs most."""
        return (max(len(self._rows(d)) for d in self._devices), *self._split.array.shape[1:])

    def _fits(self) -> bool:
        return int(np.prod(self._shape())) * self._split.array.dtype.numpy_dtype.itemsize < free_memory(self._local)

    def _load(self) -> jax.Array:
        shape = self._shape()
        parts = []
        for device in self._local:
            rows = self._rows(device)
            feats_NPF = np.zeros(shape, self._split.array.dtype.numpy_dtype)
            for first in range(0, len(rows), 256):
                some = rows[first : first + 256]
                feats_NPF[first : first + len(some)] = self._split.read(some)
            parts.append(jax.device_put(feats_NPF, device))
        whole = (shape[0] * len(self._devices), *shape[1:])
        return jax.make_array_from_single_device_arrays(whole, self._sharding, parts)


def free_memory(devices: list) -> int:
    """Bytes that features may take on each of these devices: half of an accelerator's, a third of the host's."""
    stats: Callable = devices[0].memory_stats
    limit = (stats() or {}).get("bytes_limit")
    if limit:
        return limit // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3 // len(devices)
