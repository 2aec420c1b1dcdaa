"""The preprocessing of an encoder, which is stored with its weights."""

from typing import NamedTuple


class Preprocess(NamedTuple):
    """The steps from an image of any size to an encoder's input; the fields are those of timm's configurations."""

    size: int  # pixels a side
    crop: float = 0.0  # share of the shorter side that a centre crop keeps; 0: resize to a square, aspect not kept
    resample: str = "bilinear"  # or "bicubic"; with antialiasing
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)  # of pixels 0 to 255
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
