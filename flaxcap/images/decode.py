"""Decoding: an image file from an untrusted source becomes the square of pixels that an encoder takes."""

import contextlib
import ctypes
import functools
import io
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, UnidentifiedImageError

from flaxcap.files import size_limits
from flaxcap.images import headers
from flaxcap.images.formats import FORMATS, unreadable
from flaxcap.images.headers import ImageError
from flaxcap.images.preprocess import Preprocess, centre

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several threads decode images already

# Written to a store's manifest and to exports: features match only images that were decoded in the same way.
DECODING = (
    "first frame, EXIF orientation, alpha over white, RGB of 8 bits, ICC profile ignored; large JPEG reduced;"
    " antialiased resize by Pillow"
)

# By EXIF orientation, the operation that turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS_LOCK = threading.Lock()

MAX_PIXELS = 64_000_000
# Memory of decoding: 17 bytes for WebP, up to 14 for other formats; AVIF's planes take 4 more for 10 or 12 bits.
BYTES_A_PIXEL = 18
MAX_MEMORY = MAX_PIXELS * BYTES_A_PIXEL  # of all images that are being decoded
_LARGE = MAX_MEMORY // 16  # from this size on, an image's memory is returned to the system at once
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


class _MemoryBudget:
    """Bounds the memory of images that are decoded concurrently; further threads wait."""

    def __init__(self, total: int):
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Waits for `size` free bytes and reserves them. An image larger than the budget is decoded alone."""
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            if size >= _LARGE and _TRIM is not None:
                _TRIM(0)  # glibc keeps freed memory for the thread that freed it: other threads could not use it
            with self._changed:
                self._free += size
                self._changed.notify_all()


_MEMORY = _MemoryBudget(MAX_MEMORY)


def describe(preprocess: Preprocess) -> dict[str, Any]:
    """Returns the decoding and the preprocessing as JSON, for manifests."""
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in preprocess._asdict().items()}
    return {"decoding": DECODING} | fields


def for_encoder(image: bytes | Image.Image | np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Returns the pixels of an image as an encoder takes them, uint8 `[size, size, 3]`.

    Args:
      image: the bytes of a file (see `to_square`), a PIL image, or uint8 pixels [Y, X, 3], [Y, X, 4] or [Y, X].
      preprocess: of the encoder.

    Raises:
      ImageError: the image cannot be read, or an array has another shape or dtype.
    """
    if isinstance(image, bytes):
        return to_square(image, preprocess.size, crop=preprocess.crop, resample=preprocess.resample)
    if isinstance(image, np.ndarray):
        image = _of_array(image)
    if not all(image.size):
        raise ImageError(f"the image has no pixels ({image.width}x{image.height})")
    frame = _square(preprocess.size, preprocess.crop, *image.size)
    try:
        return _resized(image, frame, frame.box, Image.Resampling[preprocess.resample.upper()])
    except ImageError:
        raise
    except Exception as error:  # Pillow reads a file's pixels at first use; damaged ones raise nearly any exception
        raise ImageError(f"damaged: {str(error) or type(error).__name__}") from error


def _of_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,), (4,)):
        raise ImageError(
            f"found an array {pixels.dtype} {list(pixels.shape)}, expected uint8 [Y, X, 3], [Y, X, 4] or [Y, X]"
        )
    if not pixels.size:
        raise ImageError(f"the image has no pixels ({pixels.shape[1]}x{pixels.shape[0]})")
    return Image.fromarray(pixels)


def to_square(
    data: bytes, size: int, *, crop: float = 0.0, resample: str = "bilinear", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes an image file to a square. Thread-safe.

    Transparent pixels are composited over white, the usual background of such drawings. A JPEG at least four times as
    large as needed is decoded at a half, a quarter or an eighth of its size, and at least twice as large as needed.
    For a camera's image this takes a quarter of the time, and differs from a full decoding by less than half a grey
    level on average.

    Everything except damaged pixels is refused before pixels are unpacked. One image takes up to BYTES_A_PIXEL bytes
    a pixel, and all threads together MAX_MEMORY (1.2 GB). Three bytes for each byte of the files come on top.

    Args:
      data: the bytes of the file.
      size: pixels a side.
      crop: share of the shorter side that a centre crop keeps; 0: the complete image, without its aspect.
      resample: "bilinear" or "bicubic"; Pillow's, with antialiasing.
      max_pixels: largest number of pixels in the file.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: the file is empty, larger than `size_limits.IMAGE`, truncated, damaged, in none of `FORMATS`, has
        more than `max_pixels` pixels, or has a header that `headers.check` refuses.
    """
    frame_of = functools.partial(_square, size, crop)
    return _decode(data, max_pixels, frame_of, Image.Resampling[resample.upper()])


def to_thumbnail(data: bytes, longest: int = 480, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file for display, with its aspect. Limits and errors are those of `to_square`.

    Args:
      data: the bytes of the file.
      longest: pixels of the longer side. A smaller image is not enlarged.
      max_pixels: largest number of pixels in the file.

    Returns:
      uint8 [Y, X, 3].
    """

    def frame(width: int, height: int) -> _Frame:
        scale = min(1, longest / max(width, height))
        box = (0.0, 0.0, width, height)
        return _Frame(max(1, round(width * scale)), max(1, round(height * scale)), box)

    return _decode(data, max_pixels, frame, Image.Resampling.BILINEAR)


class _Frame(NamedTuple):
    """The part of an image that is kept, and its size after resizing. The image is turned upright later."""

    width: int
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the file


def _square(size: int, crop: float, width: int, height: int) -> _Frame:
    """Returns the frame of a square of `size` pixels a side: a centre crop, or all of the image if `crop` is 0."""
    return _Frame(size, size, centre(width, height, crop))


def _decode(
    data: bytes, max_pixels: int, frame_of: Callable[[int, int], _Frame], resample: Image.Resampling
) -> np.ndarray:
    """Decodes the part of an image file that `frame_of(width, height)` keeps, uint8 [Y, X, 3]."""
    if not data:
        raise ImageError("the file is empty")
    if len(data) > size_limits.IMAGE:
        raise ImageError(f"the file has more than the {size_limits.IMAGE} bytes allowed")
    cost = headers.check(data)
    if cost.pixels > max_pixels:
        raise ImageError(f"a frame of {cost.pixels} pixels is more than the {max_pixels} allowed")
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not all(image.size):
                raise ImageError(f"the image has no pixels ({image.width}x{image.height})")
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width}x{image.height} pixels are more than the {max_pixels} allowed")
            frame, full = frame_of(*image.size), image.size
            full_pixels = image.width * image.height
            left, top, right, bottom = frame.box
            scales = frame.width / (right - left), frame.height / (bottom - top)
            drafted = image.draft(None, (math.ceil(2 * full[0] * scales[0]), math.ceil(2 * full[1] * scales[1])))
            # libjpeg keeps all coefficients of several scans, but only a few rows of a single scan.
            kept = full_pixels if cost.scans > 1 or "progressive" in image.info else image.width * image.height
            # Closed before its bytes are free for others: an exception's traceback would otherwise keep the pixels.
            with _MEMORY.reserve(max(kept, cost.pixels) * BYTES_A_PIXEL), contextlib.closing(image):
                return _resized(image, frame, _scaled(frame.box, full, drafted and drafted[1]), resample)
    except ImageError as error:
        reason = str(error)
    except UnidentifiedImageError:
        found = unreadable(data)
        reason = f"{f'found {found}' if found else 'not an image, or a damaged header'} (expected {', '.join(FORMATS)})"
    except Image.DecompressionBombError as error:
        reason = f"too many pixels: {error}"
    except Exception as error:  # Pillow 13's decoders raise many kinds for damaged files
        reason = f"damaged: {str(error) or type(error).__name__}"
    raise ImageError(reason)  # without the cause: its traceback holds the decoder with the pixels


def _scaled(box: tuple, full: tuple[int, int], covered: tuple | None) -> tuple[float, float, float, float] | None:
    """Returns a box in the pixels of the decoded image; None: all of it.

    Args:
      box: in pixels of the file.
      full: width and height of the file.
      covered: the part of a reduced JPEG that its pixels cover completely; None: the file is not reduced.
    """
    if box == (0.0, 0.0, *full):
        return covered
    if covered is None:
        return box
    x, y = covered[2] / full[0], covered[3] / full[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _resized(
    image: Image.Image, frame: _Frame, box: tuple[float, float, float, float] | None, resample: Image.Resampling
) -> np.ndarray:
    image.load()
    orientation = _orientation(image)
    # Compositing and turning come after resizing, because the image then has fewer pixels.
    small = _eight_bit(image).resize((frame.width, frame.height), resample, box)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    small = small.convert("RGB")
    if orientation in _UPRIGHT:
        small = small.transpose(_UPRIGHT[orientation])
    return np.array(small)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Returns the image as L, RGB or RGBA."""
    if image.mode == "F":
        raise ImageError("found floating-point pixels, whose range is unknown; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow stores in 32 for some formats
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError("found 32-bit pixels, expected 8 or 16 bits")
        wide = pixels.astype(np.uint32) + 128
        wide //= 257  # 65535 / 255, rounded
        return Image.fromarray(wide.astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 to 8; 1 if there is none or the metadata are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _silence_pillow() -> None:
    """Makes Python ignore Pillow's warnings about odd files from now on.

    warnings.catch_warnings() around each image is not thread-safe: Python 3.11 replaces a list that all threads share.
    """
    entry = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    with _FILTERS_LOCK:
        if entry not in warnings.filters:
            warnings.filterwarnings("ignore", module=r"PIL\.")
