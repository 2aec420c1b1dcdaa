"""From an image file's bytes, whoever sent them, to the square of pixels that an encoder takes."""

import contextlib
import ctypes
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from flaxcap.files import size_limits
from flaxcap.images import headers
from flaxcap.images.headers import ImageError

# Decoders that are part of Pillow; of the others some start programs (EPS), and all are rare.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What `to_square` and the encoder do to an image, for the store's manifest: other features would not match.
PREPROCESSING = (
    "first frame, EXIF orientation, alpha over white, RGB of 8 bits, ICC profile ignored; large JPEG reduced;"
    " Pillow bilinear with antialiasing to a square, aspect not kept; pixel / 127.5 - 1"
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = threading.Lock()

MAX_PIXELS = 64_000_000
BYTES_A_PIXEL = 17  # that decoding may take: WebP; others take 14
MAX_MEMORY = MAX_PIXELS * BYTES_A_PIXEL  # of all pictures that are decoded at once
_LARGE = MAX_MEMORY // 16  # a picture's memory that is given back at once
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone


class _Memory:
    """Lets pictures be decoded side by side as long as they take so many bytes together; the others wait."""

    def __init__(self, most: int):
        self._most = self._free = most
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        wanted = min(wanted, self._most)  # what takes more than all goes alone
        with self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            if wanted >= _LARGE and _TRIM is not None:
                _TRIM(0)  # glibc keeps what a thread has freed for that thread: the next one's would come on top
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


_MEMORY = _Memory(MAX_MEMORY)


def to_square(data: bytes, size: int = 299, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file's bytes -> uint8 `[size, size, 3]`, as `PREPROCESSING` says; any thread may call it.

    Transparent pixels are laid over white, the usual page behind such drawings. A JPEG at least four times as
    large as needed is decoded at a half, a quarter or an eighth of its size, still twice as large as needed:
    four times faster for a camera's picture, and within half a grey level of a full decoding on average.
    ImageError if the bytes are empty, more than `limits.PICTURE`, cut off, damaged, not an image of `FORMATS`, one
    of over `max_pixels`, or with a header that `headers.check` refuses; all but damage is seen before pixels are
    unpacked. Memory: up to BYTES_A_PIXEL, and MAX_MEMORY (1.1 GB) for all threads together, beside at most 3 bytes
    for each byte of the files in their hands.
    """
    return _decode(data, max_pixels, lambda width, height: (size, size))


def to_thumbnail(data: bytes, longest: int = 480, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture to look at, uint8 `[Y, X, 3]`: its aspect is kept, and no side is over `longest`, or enlarged.

    All else is as in `to_square`.
    """

    def size(width: int, height: int) -> tuple[int, int]:
        scale = min(1, longest / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    return _decode(data, max_pixels, size)


def _decode(data: bytes, max_pixels: int, size: Callable[[int, int], tuple[int, int]]) -> np.ndarray:
    """`size`: the width and height wanted of a file of this width and height, before it is turned upright."""
    if not data:
        raise ImageError("the file is empty")
    if len(data) > size_limits.PICTURE:
        raise ImageError(f"the file has more than the {size_limits.PICTURE} bytes allowed")
    scans = headers.check(data)
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not all(image.size):
                raise ImageError(f"the image has no pixels ({image.width}x{image.height})")
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width}x{image.height} pixels are more than the {max_pixels} allowed")
            width, height = size(*image.size)
            whole = image.width * image.height
            drafted = image.draft(None, (2 * width, 2 * height))
            # libjpeg keeps all coefficients until the last scan; of a single scan it keeps a few rows.
            kept = whole if scans > 1 or "progressive" in image.info else image.width * image.height
            # Closed, it gives its pixels back first: else they would count as free while somebody holds its error.
            with _MEMORY.take(kept * BYTES_A_PIXEL), contextlib.closing(image):
                return _resized(image, width, height, drafted[1] if drafted else None)
    except ImageError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = f"not an image, or a damaged header (read here: {', '.join(FORMATS)})"
    except Image.DecompressionBombError as error:
        reason = f"too many pixels: {error}"
    except Exception as error:  # for damaged files Pillow's decoders raise nearly every kind of exception
        reason = f"damaged: {str(error) or type(error).__name__}"
    raise ImageError(reason)  # a new one: what was raised holds the decoder, and with it the pixels


def _resized(
    image: ImageFile.ImageFile, width: int, height: int, box: tuple[float, float, float, float] | None
) -> np.ndarray:
    """`box`: of a reduced JPEG what its pixels cover wholly, without a last row or column that they cover partly."""
    image.load()
    orientation = _orientation(image)
    # It is turned upright and laid over white after it was resized, when its pixels are few.
    small = _eight_bit(image).resize((width, height), Image.Resampling.BILINEAR, box)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    small = small.convert("RGB")
    if orientation in _UPRIGHT:
        small = small.transpose(_UPRIGHT[orientation])
    return np.array(small)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image as L, RGB or RGBA."""
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits, also where Pillow keeps them in 32
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError("32-bit pixels, expected 8 or 16 bits")
        wide = pixels.astype(np.uint32) + 128
        wide //= 257  # 65535 / 255, rounded
        return Image.fromarray(wide.astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or damaged metadata on a sound picture."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _silence_pillow() -> None:
    """Has Python ignore, from now on, the warnings that Pillow's modules give about odd files.

    `warnings.catch_warnings` swaps a list that all threads share, so it cannot be put around each image.
    """
    entry = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    with _FILTERS:
        if entry not in warnings.filters:
            warnings.filterwarnings("ignore", module=r"PIL\.")
