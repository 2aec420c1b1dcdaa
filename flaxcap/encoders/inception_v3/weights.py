"""InceptionV3's weights: Keras's published file, a file with the same layout, or random weights."""

import itertools
import math
import os
import pathlib
import re
import zlib
from typing import TYPE_CHECKING

import jax
import numpy as np

from flaxcap.encoders.base import Sample, WeightsError, digest, normalise
from flaxcap.encoders.download import digest_of_file, fetch
from flaxcap.encoders.inception_v3 import network
from flaxcap.encoders.inception_v3.network import Params
from flaxcap.files import size_limits
from flaxcap.images.preprocess import Preprocess

# Functions that read HDF5 import h5py: random weights do not need it, and jax, flax and orbax do not install it.
if TYPE_CHECKING:
    import h5py

OFFICIAL_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/"
    "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
OFFICIAL_MD5 = "bcbd6486424b2319ff4ef7d526e38f63"  # as in keras.applications
_CHUNK_BYTES = 64 << 20  # of a data set; the largest kernel has 7 MB
_BATCH_NORM = {"beta": "beta", "moving_mean": "mean", "moving_variance": "var"}  # Keras's name -> ours


def load(
    spec: str,
    *,
    block: str = "mixed10",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    sample: Sample | None = None,
) -> tuple[Params, str]:
    """Returns the unfolded parameters up to `block` (NumPy, float32) and a SHA-256.

    The SHA-256 is that of the file. For random weights it is that of the parameters, whose last bits differ between
    kinds of machines.

    Args:
      spec: "imagenet" (Keras's file, downloaded once), "random", or the path of an HDF5 file with Keras's layout.
      block: the last block.
      seed: of random weights.
      cache_dir: where the download is kept; default: flaxcap's cache.
      sample: gives images, uint8 `[I, Y, X, 3]`, whose statistics the batch norms of random weights take.

    Raises:
      WeightsError: the weights cannot be read, or do not fit.
    """
    if spec == "random":
        if sample is None:
            raise WeightsError("random encoder weights need images, whose statistics their batch norms take")
        images_IYX3 = sample()
        normalised = normalise(images_IYX3, Preprocess(images_IYX3.shape[1]), np.float32)
        params = network.measure(network.init(jax.random.key(seed), block), normalised, block)
        return params, digest(params)
    path = fetch(OFFICIAL_URL, OFFICIAL_MD5, cache_dir) if spec == "imagenet" else pathlib.Path(spec)
    return read(path, block), digest_of_file(path, "sha256")


def read(path: str | os.PathLike[str], block: str = "mixed10") -> Params:
    """Returns the unfolded parameters up to `block` from an HDF5 file with the layout of Keras's no-top file.

    Layers are taken in the order of their numbers, which may start anywhere (conv2d, conv2d_1, conv2d_94): Keras
    continues the numbers of earlier models. The file is read as data only. Links out of it are refused, and so are data
    that unpack to more than their shape, or by anything but gzip.

    Args:
      path: of the file.
      block: the last block.

    Raises:
      WeightsError: the file is not HDF5, or a layer is missing, has another shape, is not float or not finite.
    """
    import h5py

    path = pathlib.Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}: expected 'imagenet', 'random' or an HDF5 file's path")
    if (size := path.stat().st_size) > size_limits.WEIGHTS:
        raise WeightsError(f"{path}: found {size} bytes, expected at most {size_limits.WEIGHTS}")
    try:
        with h5py.File(path, "r") as file:
            return _read(file, network.kernel_shapes(block))
    except WeightsError:
        raise
    except Exception as error:  # for damaged files h5py raises nearly every kind of exception
        raise WeightsError(f"{path} is not a readable HDF5 file: {error}") from error


def _read(file: "h5py.File", shapes: dict[str, tuple[int, int, int, int]]) -> Params:
    kernels = _numbered(file, "conv2d", len(shapes))
    norms = _numbered(file, "batch_normalization", len(shapes))
    params: Params = {}
    for (name, shape), kernel, norm in zip(shapes.items(), kernels, norms, strict=True):
        params[name] = {"kernel": _array(file, kernel, "kernel", shape)}
        for theirs, ours in _BATCH_NORM.items():
            params[name][ours] = _array(file, norm, theirs, shape[-1:])
        if params[name]["var"].min() < 0:
            raise WeightsError(f"{file.filename}: layer {norm} has a negative moving_variance")
    return params


def _numbered(file: "h5py.File", kind: str, count: int) -> list[str]:
    """Returns the names of the first `count` layers of a kind, by number. Raises WeightsError if one is missing."""
    matches = [re.fullmatch(kind + r"(?:_(\d{1,6}))?", str(name)) for name in file]
    numbers = {int(match[1] or 0): match[0] for match in matches if match}
    first = min(numbers, default=1)
    for number in range(first, first + count):
        if number not in numbers:
            raise WeightsError(
                f"{file.filename}: layer {kind}_{number} is missing; found {len(numbers)} layers {kind}_N,"
                f" the first N being {first}, expected {count} in a row"
            )
    return [numbers[number] for number in range(first, first + count)]


def _array(file: "h5py.File", layer: str, weight: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a layer's weight as float32. Raises WeightsError if it is not what is expected."""
    where = f"{file.filename}: layer {layer}, {weight}"
    found = _find(file, layer, weight)
    if found is None:
        raise WeightsError(f"{where}: found nothing, expected an array of shape {list(shape)}")
    if found.shape != shape or found.dtype.kind != "f":
        raise WeightsError(f"{where}: found {found.dtype} {list(found.shape or ())}, expected floats of {list(shape)}")
    if found.external or found.is_virtual:
        raise WeightsError(f"{where}: found data kept in another file, expected it in this one")
    if found.chunks is not None:
        _check_packed(found, found.chunks, where)
    with np.errstate(all="ignore"):  # a float64 that is too large becomes inf, which is reported below
        array = np.asarray(found[()], np.float32)
    if not np.isfinite(array).all():
        raise WeightsError(f"{where}: found values that are not finite numbers")
    return array


def _check_packed(found: "h5py.Dataset", chunk: tuple[int, ...], where: str) -> None:
    """Raises WeightsError unless gzip alone unpacks each chunk to at most its size. HDF5 itself sets no bound."""
    import h5py

    how = found.id.get_create_plist()
    filters = [how.get_filter(n)[0] for n in range(how.get_nfilters())]
    if not set(filters) <= {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE} or len(set(filters)) < len(filters):
        raise WeightsError(f"{where}: found data packed by HDF5's filters {filters}, expected gzip or none")
    size = math.prod(chunk) * found.dtype.itemsize
    if size > _CHUNK_BYTES:
        raise WeightsError(f"{where}: found chunks of {size} bytes, expected at most {_CHUNK_BYTES}")
    for corner in itertools.product(*map(range, itertools.repeat(0), found.shape, chunk)):
        if found.id.get_chunk_info_by_coord(corner).size > size + _CHUNK_BYTES // 1000:
            raise WeightsError(f"{where}: found a chunk that is larger packed than unpacked")
        _, packed = found.id.read_direct_chunk(corner)
        if filters[-1:] == [h5py.h5z.FILTER_DEFLATE] and len(zlib.decompressobj().decompress(packed, size + 1)) > size:
            raise WeightsError(f"{where}: found a chunk that unpacks to more than its {size} bytes")


def _find(file: "h5py.File", layer: str, weight: str) -> "h5py.Dataset | None":
    """Returns the data set `weight` or `weight:0` below the layer's group, at any depth."""
    import h5py

    below: list[tuple[h5py.Group, str]] = [(file, layer)]
    for _ in range(64):  # a layer holds few names; groups linked in a circle have no end
        if not below:
            break
        group, name = below.pop()
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise WeightsError(f"{file.filename}: layer {layer}: found a link, expected data in this file")
        item = group[name]
        if isinstance(item, h5py.Group):
            below += [(item, str(child)) for child in item]
        elif isinstance(item, h5py.Dataset) and name.removesuffix(":0") == weight:
            return item
    return None
