"""The architecture of InceptionV3 (Szegedy et al. 2015, arXiv:1512.00567) as Keras builds it, as a table.

A path is a list of steps. A step is a convolution with batch norm and relu, a maximum, or a tuple of paths that share
their input and are concatenated.
"""

from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution without bias, batch norm without scale, and relu."""

    filters: int
    rows: int
    columns: int
    stride: int = 1
    padding: str = "SAME"
    # A 3x3 average (stride 1, SAME, padding does not count) precedes the batch norm. Keras averages the input of the
    # 1x1 convolution instead: the same function, with at least 4 times as many channels to average.
    average: bool = False


MAXIMUM = "3x3 maximum, stride 2, VALID"


def _block_35(pooled: int) -> tuple:
    return (
        [Conv(64, 1, 1)],
        [Conv(48, 1, 1), Conv(64, 5, 5)],
        [Conv(64, 1, 1), Conv(96, 3, 3), Conv(96, 3, 3)],
        [Conv(pooled, 1, 1, average=True)],
    )


def _block_17(width: int) -> tuple:
    across, down = Conv(width, 1, 7), Conv(width, 7, 1)
    return (
        [Conv(192, 1, 1)],
        [Conv(width, 1, 1), across, Conv(192, 7, 1)],
        [Conv(width, 1, 1), down, across, down, Conv(192, 1, 7)],
        [Conv(192, 1, 1, average=True)],
    )


def _block_8() -> tuple:
    fork = ([Conv(384, 1, 3)], [Conv(384, 3, 1)])
    return (
        [Conv(320, 1, 1)],
        [Conv(384, 1, 1), fork],
        [Conv(448, 1, 1), Conv(384, 3, 3), fork],
        [Conv(192, 1, 1, average=True)],
    )


STEM: list = [
    Conv(32, 3, 3, 2, "VALID"),
    Conv(32, 3, 3, 1, "VALID"),
    Conv(64, 3, 3),
    MAXIMUM,
    Conv(80, 1, 1),
    Conv(192, 3, 3, 1, "VALID"),
    MAXIMUM,
]
NETWORK: dict[str, tuple] = {
    "mixed0": _block_35(32),
    "mixed1": _block_35(64),
    "mixed2": _block_35(64),
    "mixed3": (
        [Conv(384, 3, 3, 2, "VALID")],
        [Conv(64, 1, 1), Conv(96, 3, 3), Conv(96, 3, 3, 2, "VALID")],
        [MAXIMUM],
    ),
    "mixed4": _block_17(128),
    "mixed5": _block_17(160),
    "mixed6": _block_17(160),
    "mixed7": _block_17(192),
    "mixed8": (
        [Conv(192, 1, 1), Conv(320, 3, 3, 2, "VALID")],
        [Conv(192, 1, 1), Conv(192, 1, 7), Conv(192, 7, 1), Conv(192, 3, 3, 2, "VALID")],
        [MAXIMUM],
    ),
    "mixed9": _block_8(),
    "mixed10": _block_8(),
}
BLOCKS = tuple(NETWORK)
