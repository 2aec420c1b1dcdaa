"""Convolutions of stride 1 with a half to a quarter of the multiplications (Lavin & Gray 2016, arXiv:1509.09308).

Along an axis, inputs and kernel are polynomials, which are multiplied at m + r - 1 points: m neighbouring outputs of a
kernel with r entries take m + r - 1 products. So a convolution is one matrix product for each point of a tile:

    kernel_p = G kernel      inputs_p = B inputs      outputs = A (inputs_p · kernel_p)
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# r -> m. With these, a convolution's largest error in float32 is 3 to 6 times that of the plain one.
OUTPUTS = {1: 1, 3: 4, 5: 2, 7: 2}
# One more point is at infinity. Among numbers that are exact in binary, these gave the smallest errors.
_POINTS = {1: [], 6: [0, 1, -1, Fraction(1, 2), -2], 8: [0, 1, -1, Fraction(1, 2), Fraction(-1, 2), 2, -2]}


class _Matrices(NamedTuple):
    inputs: np.ndarray  # B [n, n]
    kernel: np.ndarray  # G [n, r]
    outputs: np.ndarray  # A [m, n]


@functools.cache
def _matrices(size: int) -> _Matrices:
    """Returns the matrices of a kernel with `size` entries along an axis (Toom and Cook's, transposed)."""
    m = OUTPUTS[size]
    points = [Fraction(p) for p in _POINTS[m + size - 1]]
    others = [[q for q in points if q != p] for p in points]
    inputs = [[*_coefficients(roots), 0] for roots in others] + [_coefficients(points)]
    kernel = []
    for point, roots in zip(points, others, strict=True):
        scale = math.prod(point - q for q in roots)
        kernel.append([point**j / scale for j in range(size)])
    kernel.append([0] * (size - 1) + [1])
    outputs = [[p**j for p in points] + [int(j == m - 1)] for j in range(m)]
    return _Matrices(*(np.array(rows, np.float64) for rows in (inputs, kernel, outputs)))


def _coefficients(roots: Sequence[Fraction]) -> list[Fraction]:
    """Returns the coefficients of the product of all (x - root), from x⁰ on."""
    found = [Fraction(1)]
    for root in roots:
        found = [up - root * own for up, own in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def suits(shape: Sequence[int]) -> bool:
    """Returns True if a kernel `[rows, columns, in, out]` is faster than in a plain convolution, measured on a CPU.

    With few channels the transformations cost more than the products that they save. Transformed kernels must also fit
    into the caches.
    """
    rows, columns, width, filters = shape
    points = math.prod(OUTPUTS[size] + size - 1 for size in (rows, columns))
    return rows * columns > 1 and width >= 48 and points * width * filters <= 2_000_000


def transform(kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel `[rows, columns, in, out]` as `convolve` takes it: float32 `[points, points, in, out]`."""
    rows, columns = (_matrices(size).kernel for size in kernel.shape[:2])
    return np.einsum("ai,bj,ijxy->abxy", rows, columns, np.asarray(kernel, np.float64)).astype(np.float32)


def convolve(x: jax.Array, kernel: jax.Array, size: tuple[int, int], padding: str) -> jax.Array:
    """Returns the convolution of x with a transformed kernel, `[I, y, x, out]`.

    Args:
      x: float32 `[I, Y, X, in]`.
      kernel: of `transform`.
      size: rows and columns of the kernel before the transformation.
      padding: "SAME" or "VALID".
    """
    edge = [n - 1 if padding == "SAME" else 0 for n in size]
    found = [x.shape[1 + a] + edge[a] - size[a] + 1 for a in range(2)]  # outputs
    tiles = [-(-found[a] // OUTPUTS[size[a]]) for a in range(2)]
    spare = [tiles[a] * OUTPUTS[size[a]] - found[a] for a in range(2)]
    x = jnp.pad(x, ((0, 0), *((edge[a] // 2, edge[a] - edge[a] // 2 + spare[a]) for a in range(2)), (0, 0)))

    rows, columns = (_matrices(n) for n in size)  # one axis after the other
    x = jnp.stack(_combine(rows.inputs, _tiled(x, 1, tiles[0], size[0])))
    x = jnp.stack(_combine(columns.inputs, _tiled(x, 3, tiles[1], size[1])), 1)
    products = jnp.matmul(
        x.reshape(-1, math.prod(x.shape[2:5]), x.shape[-1]),
        kernel.reshape(-1, *kernel.shape[2:]),
        precision="highest",
    ).reshape(*x.shape[:5], -1)
    y = jnp.stack(_combine(columns.outputs, list(jnp.moveaxis(products, 1, 0))), 4)
    y = jnp.stack(_combine(rows.outputs, list(y)), 2)
    y = y.reshape(len(y), math.prod(y.shape[1:3]), math.prod(y.shape[3:5]), -1)
    return y[:, : found[0], : found[1]]


def _tiled(x: jax.Array, axis: int, tiles: int, size: int) -> list[jax.Array]:
    """Returns the first entries of all tiles along an axis, the second entries, and so on. Tiles overlap."""
    m = OUTPUTS[size]
    last = m * (tiles - 1) + 1
    return [jax.lax.slice_in_dim(x, n, n + last, m, axis) for n in range(m + size - 1)]


def _combine(matrix: np.ndarray, terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns matrix @ terms, written as sums: most factors are 0, 1 or a power of two."""
    return [
        functools.reduce(jnp.add, [x if f == 1 else x * np.float32(f) for f, x in zip(row, terms, strict=True) if f])
        for row in matrix
    ]
