"""From an image file's bytes, whoever sent them, to the square of pixels that an encoder takes."""

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
from PIL import ExifTags, Image, UnidentifiedImageError

from flaxcap.files import size_limits
from flaxcap.images import headers
from flaxcap.images.headers import ImageError
from flaxcap.images.preprocess import Preprocess, centre

# Decoders that are part of Pillow; of the others some start programs (EPS), and all are rare.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# The decoding of an image, for the manifest of a store: features of another decoding would not match.
DECODING = (
    "first frame, EXIF orientation, alpha over white, RGB of 8 bits, ICC profile ignored; large JPEG reduced;"
    " Pillow's antialiased resize"
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


def describe(preprocess: Preprocess) -> dict[str, Any]:
    """Returns JSON of what happens to an image before the encoder."""
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
    """An image file's bytes -> uint8 `[size, size, 3]`; any thread may call it.

    Transparent pixels are laid over white, the usual page behind such drawings. A JPEG at least four times as
    large as needed is decoded at a half, a quarter or an eighth of its size, still twice as large as needed:
    four times faster for a camera's picture, and within half a grey level of a full decoding on average.
    ImageError if the bytes are empty, more than `size_limits.IMAGE`, cut off, damaged, not an image of `FORMATS`, one
    of over `max_pixels`, or with a header that `headers.check` refuses; all but damage is seen before pixels are
    unpacked. Memory: up to BYTES_A_PIXEL, and MAX_MEMORY (1.1 GB) for all threads together, beside at most 3 bytes
    for each byte of the files in their hands.
    """
    frame_of = functools.partial(_square, size, crop)
    return _decode(data, max_pixels, frame_of, Image.Resampling[resample.upper()])


def to_thumbnail(data: bytes, longest: int = 480, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture to look at, uint8 `[Y, X, 3]`: its aspect is kept, and no side is over `longest`, or enlarged.

    All else is as in `to_square`.
    """

    def frame(width: int, height: int) -> _Frame:
        scale = min(1, longest / max(width, height))
        box = (0.0, 0.0, width, height)
        return _Frame(max(1, round(width * scale)), max(1, round(height * scale)), box)

    return _decode(data, max_pixels, frame, Image.Resampling.BILINEAR)


class _Frame(NamedTuple):
    """The part of an image that is kept, and its size afterwards, before the image is turned upright."""

    width: int
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the file


def _square(size: int, crop: float, width: int, height: int) -> _Frame:
    """Returns the frame of a square of `size` pixels a side: a centre crop, or all of the image if `crop` is 0."""
    return _Frame(size, size, centre(width, height, crop))


def _decode(
    data: bytes, max_pixels: int, frame_of: Callable[[int, int], _Frame], resample: Image.Resampling
) -> np.ndarray:
    """Returns the frame's pixels. `frame_of(width, height)`: of a file of this size."""
    if not data:
        raise ImageError("the file is empty")
    if len(data) > size_limits.IMAGE:
        raise ImageError(f"the file has more than the {size_limits.IMAGE} bytes allowed")
    scans = headers.check(data)
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not all(image.size):
                raise ImageError(f"the image has no pixels ({image.width}x{image.height})")
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width}x{image.height} pixels are more than the {max_pixels} allowed")
            frame, full = frame_of(*image.size), image.size
            whole = image.width * image.height
            left, top, right, bottom = frame.box
            scales = frame.width / (right - left), frame.height / (bottom - top)
            drafted = image.draft(None, (math.ceil(2 * full[0] * scales[0]), math.ceil(2 * full[1] * scales[1])))
            # libjpeg keeps all coefficients until the last scan; of a single scan it keeps a few rows.
            kept = whole if scans > 1 or "progressive" in image.info else image.width * image.height
            # Closed, it gives its pixels back first: else they would count as free while somebody holds its error.
            with _MEMORY.take(kept * BYTES_A_PIXEL), contextlib.closing(image):
                return _resized(image, frame, _scaled(frame.box, full, drafted and drafted[1]), resample)
    except ImageError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = f"not an image, or a damaged header (read here: {', '.join(FORMATS)})"
    except Image.DecompressionBombError as error:
        reason = f"too many pixels: {error}"
    except Exception as error:  # for damaged files Pillow's decoders raise nearly every kind of exception
        reason = f"damaged: {str(error) or type(error).__name__}"
    raise ImageError(reason)  # a new one: what was raised holds the decoder, and with it the pixels


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
    # It is turned upright and laid over white after it was resized, when its pixels are few.
    small = _eight_bit(image).resize((frame.width, frame.height), resample, box)
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
