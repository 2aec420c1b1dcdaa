"""The preprocessing of an encoder, which is stored with its weights."""

from typing import NamedTuple


class Preprocess(NamedTuple):
    """The steps from an image of any size to an encoder's input; the fields are those of timm's configurations."""

    size: int  # pixels a side
    crop: float = 0.0  # share of the shorter side that a centre crop keeps; 0: resize to a square, aspect not kept
    resample: str = "bilinear"  # or "bicubic"; with antialiasing
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)  # of pixels 0 to 255
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)


def centre(width: int, height: int, crop: float) -> tuple[float, float, float, float]:
    """Returns the part of an image that an encoder sees: left, top, right and bottom in pixels.

    Args:
      width: of the image.
      height: of the image.
      crop: as in `Preprocess`.
    """
    if not crop:
        return 0.0, 0.0, float(width), float(height)
    side = crop * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
