"""Feature maps that another program made: one `.npy` file an image.

FOLDER/FILENAME.npy is a float array [P, F] or [Y, X, F]. Any number of positions is possible: 64 in TensorFlow's
captioning tutorial, 49 or 196 for other networks. P may vary between images, as the regions of an object detector do.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np
import tqdm
from etils import epath

from flaxcap.features.shards import Split, StoreError

_HEADER_THREADS = 8  # on a network file system every header takes a round trip
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class FeatureShape(NamedTuple):
    """The shape of an image's features, [P, F]."""

    positions: int  # P: the largest number, if it varies
    feature_dim: int  # F
    positions_vary: bool = False  # between images

    @property
    def text(self) -> str:
        """The sizes in words, for messages."""
        return f"{'at most ' if self.positions_vary else ''}{self.positions} positions of {self.feature_dim} features"


def find_shape(folder: epath.Path, filenames: Sequence[str]) -> FeatureShape:
    """Returns the shape into which the maps of all images fit. Reads only the headers of the files.

    Args:
      folder: the directory of the maps.
      filenames: the images of all splits, at least one.

    Raises:
      StoreError: a map is missing, is not an array of floats, or has another width than the first one.
    """
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        found = pool.map(functools.partial(_map_shape, folder), filenames)
        shapes = list(tqdm.tqdm(found, "shapes of maps", len(filenames), unit=" images", disable=None))
    width = shapes[0][1]
    for filename, shape in zip(filenames, shapes, strict=True):
        if shape[1] != width:
            raise StoreError(
                f"{folder / f'{filename}.npy'}: found {shape[1]} features a position, expected {width} as in"
                f" {filenames[0]}.npy"
            )
    numbers = {positions for positions, _ in shapes}
    return FeatureShape(max(numbers), width, len(numbers) > 1)


def loader(folder: epath.Path, split: Split, shape: FeatureShape) -> Callable[[int], np.ndarray]:
    """Returns `load(row)`, which is `read_filled` of a row's image.

    Args:
      folder: the directory of the maps.
      split: gives the filename of a row.
      shape: the store's.
    """

    return lambda row: read_filled(folder, split.rows[row].filename, shape)


def read_filled(folder: epath.Path, filename: str, shape: FeatureShape) -> np.ndarray:
    """Reads the map of an image, floats [P, F], and fills the positions that the image does not use with NaN.

    Args:
      folder: the directory of the maps.
      filename: the image's.
      shape: what the map must fit into.

    Raises:
      StoreError: see `read_npy`; or the map does not fit.
    """
    feats_PF = read_npy(folder, filename)
    positions, width = feats_PF.shape
    fits = positions <= shape.positions if shape.positions_vary else positions == shape.positions
    if not fits or width != shape.feature_dim:
        raise StoreError(
            f"{folder / f'{filename}.npy'}: found {positions} positions of {width} features, expected {shape.text}"
        )
    if positions == shape.positions:
        return feats_PF
    padding = np.full((shape.positions - positions, width), np.nan, feats_PF.dtype)
    return np.concatenate([feats_PF, padding])


def read_npy(folder: epath.Path, filename: str) -> np.ndarray:
    """Reads the map of an image, floats [P, F].

    Raises:
      StoreError: the map is missing or damaged, is not an array of floats, or holds numbers that are not finite.
    """
    file = folder / f"{filename}.npy"

    def read(f: IO[bytes]) -> np.ndarray:
        shape = _checked_shape(file, f)
        f.seek(0)
        return np.lib.format.read_array(f, allow_pickle=False).reshape(shape)

    feats_PF = _opened(file, filename, read)
    if not np.isfinite(feats_PF).all():
        raise StoreError(f"{file}: found numbers that are not finite, expected finite features")
    return feats_PF


def _map_shape(folder: epath.Path, filename: str) -> tuple[int, int]:
    file = folder / f"{filename}.npy"
    return _opened(file, filename, functools.partial(_checked_shape, file))


def _opened(file: epath.Path, filename: str, read: Callable[[IO[bytes]], Any]) -> Any:
    if not file.exists():
        raise StoreError(f"{file}: not found, expected the features of {filename}")
    try:
        with file.open("rb") as f:
            return read(f)
    except StoreError:
        raise
    except Exception as e:  # NumPy 2.4 raises exceptions of many types for damaged files
        raise StoreError(f"{file}: not a NumPy array ({e})") from e


def _checked_shape(file: epath.Path, f: IO[bytes]) -> tuple[int, int]:
    """Returns (P, F) of the map in an open file.

    Raises:
      StoreError: the file holds an array of another kind.
      ValueError: the header cannot be read, or the file is shorter than the header says.
    """
    version = np.lib.format.read_magic(f)
    if version not in _READ_HEADER:
        raise ValueError(f"found format version {version}, expected one of {', '.join(map(str, _READ_HEADER))}")
    shape, _, dtype = _READ_HEADER[version](f)
    if dtype.kind != "f" or len(shape) not in (2, 3) or min(shape) < 1:
        raise StoreError(
            f"{file}: found {dtype} {list(shape)}, expected floats [P, F] or [Y, X, F] of at least one position"
        )
    begin, expected = f.tell(), math.prod(shape) * dtype.itemsize
    found = f.seek(0, os.SEEK_END) - begin
    if found < expected:
        raise ValueError(f"found {found} bytes, expected {expected}")
    return math.prod(shape[:-1]), shape[-1]
