"""The array of a split's features: TensorStore's zarr3 format, one file for each shard, a CRC32C for each row."""

import re
from collections.abc import Sequence

import tensorstore as ts
from etils import epath

from flaxcap.files import integrity


def open_to_read(directory: epath.Path) -> ts.TensorStore:
    """Opens the array in a directory. Raises ValueError or KeyError if there is none or it is damaged."""
    return ts.open({"driver": "zarr3", "kvstore": _kvstore(directory)}, open=True, read=True).result()


def open_to_write(directory: epath.Path, shape: Sequence[int], shard_rows: int, dtype: str) -> ts.TensorStore:
    """Opens the array in a directory for writing, and creates it if there is none.

    Args:
      directory: of a disk or an object store.
      shape: [N, P, F].
      shard_rows: rows of a shard's file.
      dtype: a floating-point type, such as "bfloat16".

    Raises:
      ValueError: the array cannot be created, or there is one of another shape or dtype.
    """
    row = [1, *shape[1:]]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": row,
        "codecs": [little, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    metadata = {
        "shape": shape,
        "data_type": dtype,
        "fill_value": "NaN",  # marks the rows that were never written
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *shape[1:]]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": _kvstore(directory), "metadata": metadata}
    return ts.open(spec, open=True, create=True).result()


def reason(error: Exception) -> str:
    """Returns the first part of TensorStore's message, which continues with many lines of context."""
    return re.split(r" \[\w+='", str(error))[0]


def _kvstore(directory: epath.Path) -> str | dict[str, str]:
    # Not a file:// URL for disks: in a URL, characters such as % and ? have another meaning.
    return str(directory) if integrity.is_remote(directory) else {"driver": "file", "path": f"{directory.resolve()}/"}
