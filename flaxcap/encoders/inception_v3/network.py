"""InceptionV3 without the classifier, in plain JAX.

Convolutions are numbered conv2d_1 to conv2d_94 in the order of architecture.py, which is Keras's.

Parameters are a dict of dicts of float32 arrays, for the convolutions up to a block:

    unfolded   {"conv2d_1": {"kernel", "beta", "mean", "var"}, ...}
    folded     {"conv2d_1": {"kernel", "bias"}, ...}: what `apply` takes
    for a CPU  some layers have {"points", "bias"}; see winograd.py

Kernels are `[rows, columns, in, out]`, the other arrays `[out]`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxcap.encoders.inception_v3 import pooling, winograd
from flaxcap.encoders.inception_v3.architecture import BLOCKS, NETWORK, STEM, Conv
from flaxcap.runtime import devices

GRID = 8  # positions a side of the features
MIN_SIZE = 75  # the smallest image that Keras's InceptionV3 takes
BN_EPSILON = 1e-3

Params = dict[str, dict[str, Any]]


def _path_to(block: str) -> list:
    """Returns the table's steps from the image to `block`. Raises ValueError for an unknown block."""
    if block not in BLOCKS:
        raise ValueError(f"InceptionV3 has no block {block!r}; its blocks are {', '.join(BLOCKS)}")
    return STEM + [NETWORK[name] for name in BLOCKS[: BLOCKS.index(block) + 1]]


def _walk(path: list, x: Any, names: Iterator[str], on_conv: Callable, on_maximum: Callable, join: Callable) -> Any:
    """Applies the steps of `path` to x. Each convolution receives the next name."""
    for step in path:
        if isinstance(step, Conv):
            x = on_conv(next(names), step, x)
        elif isinstance(step, tuple):
            x = join([_walk(branch, x, names, on_conv, on_maximum, join) for branch in step])
        else:
            x = on_maximum(x)
    return x


def _names() -> Iterator[str]:
    return (f"conv2d_{number}" for number in itertools.count(1))


def kernel_shapes(block: str = "mixed10") -> dict[str, tuple[int, int, int, int]]:
    """Returns the shape `[rows, columns, in, out]` of every kernel up to `block`, in Keras's creation order."""
    found = _convolutions(_path_to(block))
    return {name: (conv.rows, conv.columns, width, conv.filters) for name, (conv, width) in found.items()}


def kernels_before(block: str) -> list[str]:
    """Returns the names of the convolutions before `block`."""
    return list(_convolutions(_path_to(block)[:-1]))


def _convolutions(path: list) -> dict[str, tuple[Conv, int]]:
    """Returns each convolution of a path with the number of its input channels."""
    found: dict[str, tuple[Conv, int]] = {}

    def on_conv(name: str, conv: Conv, width: int) -> int:
        found[name] = conv, width
        return conv.filters

    _walk(path, 3, _names(), on_conv, lambda width: width, sum)
    return found


def _width(block: str) -> int:
    return _walk(_path_to(block), 3, _names(), lambda _, conv, __: conv.filters, lambda width: width, sum)


FEATURES = {block: _width(block) for block in BLOCKS}


def init(key: jax.Array, block: str = "mixed10") -> Params:
    """Returns random unfolded parameters: He-normal kernels, and batch norm without effect (see `measure`).

    NumPy draws them, seeded from the key: jax.random would compile a program for each of the fifty shapes.
    """
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    params: Params = {}
    for name, shape in kernel_shapes(block).items():
        spread = np.float32(np.sqrt(2 / np.prod(shape[:3])))
        out = shape[3]
        params[name] = {
            "kernel": draw.standard_normal(shape, np.float32) * spread,
            "beta": np.zeros(out, np.float32),
            "mean": np.zeros(out, np.float32),
            "var": np.ones(out, np.float32),
        }
    return params


def fold(params: Mapping[str, Mapping[str, Any]]) -> Params:
    """Returns folded parameters: the batch norm becomes part of kernel and bias."""
    folded: Params = {}
    for name, conv in params.items():
        scale = (conv["var"] + BN_EPSILON) ** -0.5
        folded[name] = {
            "kernel": conv["kernel"] * scale.reshape(1, 1, 1, -1),
            "bias": conv["beta"] - conv["mean"] * scale,
        }
    return folded


def transform(folded: Params) -> Params:
    """Returns folded parameters with some kernels transformed for `winograd.convolve`: faster in float32 on a CPU."""
    transformed = dict(folded)
    for name, (conv, _) in _convolutions(_path_to(BLOCKS[-1])).items():
        if name in folded and conv.stride == 1 and winograd.suits(folded[name]["kernel"].shape):
            transformed[name] = {"points": winograd.transform(folded[name]["kernel"]), "bias": folded[name]["bias"]}
    return transformed


def _convolve(x: jax.Array, layer: Mapping[str, Any], conv: Conv) -> jax.Array:
    if "points" in layer:
        return winograd.convolve(x, layer["points"], (conv.rows, conv.columns), conv.padding)
    kernel = jnp.asarray(layer["kernel"], x.dtype)
    # Without HIGHEST, accelerators round the numbers of a float32 product to bfloat16 or TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.conv_general_dilated(
        x,
        kernel,
        (conv.stride, conv.stride),
        conv.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _run(params: Mapping, x: jax.Array, block: str, batch_norm: Callable) -> jax.Array:
    """Returns the output of `block`, `[I, y, x, F]`. `batch_norm(name, x)` precedes the relu of a convolution."""

    def on_conv(name: str, conv: Conv, x: jax.Array) -> jax.Array:
        x = _convolve(x, params[name], conv)
        return jax.nn.relu(batch_norm(name, pooling.average(x) if conv.average else x))

    return _walk(_path_to(block), x, _names(), on_conv, pooling.maximum, lambda branches: jnp.concatenate(branches, -1))


def measure(params: Params, images_IYX3: Any, block: str = "mixed10") -> Params:
    """Returns unfolded parameters whose batch norms have the mean and variance of these images.

    One forward pass normalises every layer with the images' own statistics. Without it the features of a random network
    hardly differ from image to image. A deep random network amplifies rounding: bfloat16 moves its features by 2% at
    `mixed2`, and by 60% at `mixed10` (trained weights: 3%). The pass takes about 20 MB for an image of 299x299.

    Args:
      params: unfolded.
      images_IYX3: float32, normalised, square.
      block: the last block.

    Raises:
      ValueError: images that are too small or not square.
    """
    check_size(images_IYX3.shape, block, grid=1)

    def forward(params: Params, images: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        statistics = {}

        def batch_norm(name: str, x: jax.Array) -> jax.Array:
            mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
            statistics[name] = mean.reshape(-1), var.reshape(-1)
            return (x - mean) * lax.rsqrt(var + BN_EPSILON) + params[name]["beta"].reshape(1, 1, 1, -1)

        _run(params, images, block, batch_norm)
        return statistics

    statistics = jax.device_get(jax.jit(forward, compiler_options=devices.convolving())(params, images_IYX3))
    params = {name: params[name] for name in kernel_shapes(block)}  # in the table's order, which jit does not keep
    return {name: conv | dict(zip(("mean", "var"), statistics[name], strict=True)) for name, conv in params.items()}


def grid_of(size: int, block: str) -> int:
    """Returns the positions a side of `block`'s output, before pooling, for images of `size` pixels a side."""
    depth = BLOCKS.index(block)
    for stride in (2, 1, 2, 1, 2) + (2,) * ((depth >= 3) + (depth >= 8)):
        size = (size - 3) // stride + 1
    return size


def check_size(shape: tuple[int, ...], block: str, grid: int = GRID) -> None:
    """Raises ValueError unless images `[I, Y, X, 3]` are square and give at least `grid` positions a side."""
    _path_to(block)
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise ValueError(f"InceptionV3 takes square RGB images [I, size, size, 3], found {list(shape)}")
    if shape[1] < MIN_SIZE or grid_of(shape[1], block) < grid:
        needed = next(size for size in range(MIN_SIZE, 1000) if grid_of(size, block) >= grid)
        raise ValueError(
            f"InceptionV3 up to {block} needs images of at least {needed}x{needed} pixels"
            f" for its {grid}x{grid} grid, found {shape[1]}x{shape[2]}"
        )


def apply(params: Mapping[str, Mapping[str, Any]], images_IYX3: jax.Array, *, block: str = "mixed10") -> jax.Array:
    """Returns `feats_IPF` in the dtype of the images, P = 64 positions row by row, F = `FEATURES[block]`.

    Larger grids are average-pooled to 8x8. To be called inside `jax.jit`. On a CPU batches of 2 are fastest: they stay
    in its caches.

    Args:
      params: folded. Unfolded layers may be among them, for training; their statistics receive no gradient.
      images_IYX3: normalised, square.
      block: the last block.

    Raises:
      ValueError: an unknown block, or images that are not square or give a grid smaller than 8x8.
    """
    check_size(images_IYX3.shape, block)

    def batch_norm(name: str, x: jax.Array) -> jax.Array:
        layer = params[name]
        if "bias" in layer:
            return x + jnp.asarray(layer["bias"], x.dtype).reshape(1, 1, 1, -1)
        mean, var = lax.stop_gradient((layer["mean"], layer["var"]))
        scale = lax.rsqrt(jnp.asarray(var) + BN_EPSILON)
        shift = layer["beta"] - mean * scale
        return x * scale.astype(x.dtype).reshape(1, 1, 1, -1) + shift.astype(x.dtype).reshape(1, 1, 1, -1)

    x = _run(params, images_IYX3, block, batch_norm)
    if x.shape[1] != GRID:
        x = pooling.adaptive(x, GRID)
    return x.reshape(x.shape[0], GRID * GRID, x.shape[-1])
