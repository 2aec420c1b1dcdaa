"""InceptionV3's weights: Keras's published file, downloaded once; a file laid out like it; or random ones."""

import contextlib
import fcntl
import hashlib
import http.client
import itertools
import math
import os
import pathlib
import re
import urllib.error
import urllib.request
import zlib
from typing import Any, BinaryIO

import h5py
import jax
import numpy as np
from absl import logging

from flaxcap.encoders.inception_v3 import network
from flaxcap.errors import UserError
from flaxcap.files import size_limits
from flaxcap.runtime import cache

OFFICIAL_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/"
    "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
OFFICIAL_MD5 = "bcbd6486424b2319ff4ef7d526e38f63"  # as keras.applications checks it
TIMEOUT_S = 30
_BLOCK_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 20  # of a data set; its largest kernel has 7 MB
_BATCH_NORM = {"beta": "beta", "moving_mean": "mean", "moving_variance": "var"}  # Keras's name -> ours


class WeightsError(UserError):
    """Weights that cannot be had or are not an InceptionV3's; the message names file, layer and remedy."""


def load(
    spec: str,
    *,
    block: str = "mixed10",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    measure_on: Any = None,
) -> tuple[network.Params, str]:
    """The unfolded parameters up to `block` (NumPy, float32) and a SHA-256 that names them.

    `spec` is "imagenet" (Keras's file, downloaded once to `cache_dir`, else to `~/.cache/flaxcap`), "random"
    (drawn from `seed`, batch norm measured on `measure_on`, uint8 `[I, Y, X, 3]`), or the path of an HDF5
    file laid out like Keras's no-top file. The hash is the file's, or that of the random parameters, which
    differ in their last bits between kinds of machines. WeightsError for what cannot be had or used.
    """
    if spec == "random":
        if measure_on is None:
            raise WeightsError("random encoder weights need images to measure their batch norm on")
        params = network.init(jax.random.key(seed), block)
        params = network.measure(params, measure_on, block)
        return params, digest(params)
    path = fetch(OFFICIAL_URL, OFFICIAL_MD5, cache_dir) if spec == "imagenet" else pathlib.Path(spec)
    return read(path, block), _digest(path, "sha256")


def digest(params: network.Params) -> str:
    """A SHA-256 that names parameters."""
    found = hashlib.sha256()
    for name, arrays in params.items():
        for key in sorted(arrays):
            found.update(f"{name}/{key}".encode())
            found.update(np.ascontiguousarray(arrays[key], "<f4").tobytes())
    return found.hexdigest()


def _digest(path: pathlib.Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def read(path: str | os.PathLike[str], block: str = "mixed10") -> network.Params:
    """The unfolded parameters up to `block` from an HDF5 file in the layout of Keras's no-top file.

    Layers are taken in the order of their numbers, wherever these start (`conv2d`, `conv2d_1`, `conv2d_94`),
    since Keras counts on from the models it made before. WeightsError names the layer that is missing, has
    another shape, is not float or not finite, and a file that is not HDF5. The file is read as data only: links
    that lead out of it are refused, and data that would unpack to more than their shape, or by other means than gzip.
    """
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


def _read(file: h5py.File, shapes: dict[str, tuple[int, int, int, int]]) -> network.Params:
    kernels = _numbered(file, "conv2d", len(shapes))
    norms = _numbered(file, "batch_normalization", len(shapes))
    params: network.Params = {}
    for (name, shape), kernel, norm in zip(shapes.items(), kernels, norms, strict=True):
        params[name] = {"kernel": _array(file, kernel, "kernel", shape)}
        for theirs, ours in _BATCH_NORM.items():
            params[name][ours] = _array(file, norm, theirs, shape[-1:])
        if params[name]["var"].min() < 0:
            raise WeightsError(f"{file.filename}: layer {norm} has a negative moving_variance")
    return params


def _numbered(file: h5py.File, kind: str, count: int) -> list[str]:
    """The names of the first `count` layers of a kind, by number; WeightsError if one is missing."""
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


def _array(file: h5py.File, layer: str, weight: str, shape: tuple[int, ...]) -> np.ndarray:
    """A layer's weight as float32; WeightsError if it is not as expected."""
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
    with np.errstate(all="ignore"):  # a float64 too large becomes inf, and is named below
        array = np.asarray(found[()], np.float32)
    if not np.isfinite(array).all():
        raise WeightsError(f"{where}: found values that are not finite numbers")
    return array


def _check_packed(found: h5py.Dataset, chunk: tuple[int, ...], where: str) -> None:
    """WeightsError unless each chunk unpacks, by gzip alone, to no more than its size; HDF5 itself sets no bound."""
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


def _find(file: h5py.File, layer: str, weight: str) -> h5py.Dataset | None:
    """The data set `weight` or `weight:0` below the layer's group, at whatever depth."""
    below: list[tuple[h5py.Group, str]] = [(file, layer)]
    for _ in range(64):  # a layer holds a handful of names; groups linked in a circle would never end
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


def fetch(url: str, md5: str, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The path of `url`'s file in the cache, downloaded if it is not there; its checksum is always compared.

    A broken download goes on where it stopped; only a file with the right checksum gets its name; processes
    that want the same file wait for one another. WeightsError if it cannot be had, saying what to put where.
    """
    path = pathlib.Path(cache_dir or cache.cache_dir()) / url.rsplit("/", 1)[-1]
    part = path.with_name(path.name + ".part")
    by_hand = f"Fetch {url} by hand and save it as {path}, or name a copy with --encoder_weights=PATH."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # let go when the process ends, however it ends
                if not path.exists():  # another process may have finished it meanwhile
                    _download(url, md5, part, file)
                    part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(f"cannot download the encoder's weights ({url}: {error}). {by_hand}") from error
    if (found := _digest(path, "md5")) != md5:
        raise WeightsError(f"{path} has MD5 {found}, expected {md5}. Delete it to download it again. {by_hand}")
    return path


def _download(url: str, md5: str, part: pathlib.Path, file: BinaryIO) -> None:
    """Appends what `part`, open as `file`, lacks of `url`; OSError if it ends early or proves wrong."""
    start = file.seek(0, os.SEEK_END)
    logging.info("downloading %s%s", url, f" from byte {start}" if start else "")
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        file.truncate(0)  # the part is as long as the file, or longer, and was not accepted
        response = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    with response:
        size = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        if not size:
            file.truncate(0)
        told = response.headers.get("Content-Length", "")
        missing = int(told) if told.isdecimal() else 0
        while data := response.read(_BLOCK_BYTES):
            file.write(data)
            missing -= len(data)
            size += len(data)
            if size > size_limits.WEIGHTS:
                file.truncate(0)
                raise OSError(f"more than the {size_limits.WEIGHTS} bytes allowed")
    file.flush()
    os.fsync(file.fileno())
    if missing > 0:
        raise OSError(f"the connection ended {missing} bytes early; the same command goes on from there")
    if (found := _digest(part, "md5")) != md5:
        file.truncate(0)
        raise OSError(f"the download has MD5 {found}, expected {md5}")
