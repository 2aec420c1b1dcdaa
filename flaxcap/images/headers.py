"""Checks of an image file's header before Pillow reads the file.

Pillow limits only the number of pixels. A few bytes of a header can cost much more:

- a scan of a JPEG makes the decoder process all pixels once more;
- for a segment of a JPEG, a chunk of a PNG, a comment of a GIF or a strip of a TIFF, Pillow keeps a Python object;
- an AVIF's frame can be larger than the file says, see avif.py;
- for each EXIF segment of a JPEG or comment of a PPM, Pillow copies data that it has read already.
"""

import re
import struct
from typing import NamedTuple

from flaxcap.images import avif
from flaxcap.images.avif import ImageError

MAX_SEGMENTS = 1_000  # of a JPEG; a colour profile has up to 255, a depth map a similar number
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten
MAX_CHUNKS = 50_000  # of a PNG, or blocks of a GIF before its image; libpng writes a chunk for each 8 kB
MAX_VALUES = 200_000  # of a numeric tag in a TIFF's directory; an offset for each row of pixels is legitimate
MAX_TILE = 1 << 22  # pixels of a TIFF's tile, or twice the image's pixels if these are more

# A JPEG's markers, without restarts (inside a scan) and fill bytes.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_WITHOUT_LENGTH = {0x01, 0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)}
_SCAN, _END = 0xDA, 0xD9

_TEXTS_AND_TABLES = {270, 347, 700}  # TIFF's description, JPEG tables and XMP: bytes, of any number
_BYTES = {1, 2, 7}
_INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}  # TIFF's type -> bytes
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323


class Cost(NamedTuple):
    """The effort of decoding an image, as far as its header tells."""

    scans: int = 1  # of a JPEG: how often the decoder processes all pixels
    pixels: int = 0  # of an AVIF's largest coded frame


def check(data: bytes) -> Cost:
    """Returns the cost of decoding an image. Other damage than excess is left to the decoder.

    Args:
      data: the bytes of the file.

    Raises:
      ImageError: a count or size in the header exceeds its limit, or the file is a PPM in text form.
    """
    if data.startswith(b"\xff\xd8"):
        return Cost(scans=_check_jpeg(data))
    if data[4:8] == b"ftyp":
        return Cost(pixels=avif.check(data))
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)
    elif data.startswith((b"P1", b"P2", b"P3")):
        raise ImageError("found a PPM, PGM or PBM in text form, expected its binary form")
    return Cost()


def _check_jpeg(data: bytes) -> int:
    """Counts a JPEG's markers: Pillow reads those before the first scan, libjpeg the later ones."""
    position, segments, scans = 2, 0, 0
    while found := _MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == _END and scans:
            break
        if marker not in _WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2]))
        segments += 1
        scans += marker == _SCAN
        if segments > MAX_SEGMENTS:
            raise ImageError(f"found a JPEG of over {MAX_SEGMENTS} segments")
        if scans > MAX_SCANS:
            raise ImageError(f"found a JPEG of over {MAX_SCANS} scans")
    return max(scans, 1)


def _check_png(data: bytes) -> None:
    position, chunks = 8, 0
    while position < len(data):
        position += 12 + int.from_bytes(data[position : position + 4])
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise ImageError(f"found a PNG of over {MAX_CHUNKS} chunks")


def _check_gif(data: bytes) -> None:
    """Counts a GIF's blocks before its first image."""
    flags = data[10] if len(data) > 10 else 0
    position, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while position < len(data) and data[position : position + 1] not in (b",", b";"):
        extension = data[position : position + 1] == b"!"
        position += 2 if extension else 1
        while extension and position < len(data) and blocks <= MAX_CHUNKS:
            extension = data[position] > 0
            position += 1 + data[position]
            blocks += 1
        blocks += 1
        if blocks > MAX_CHUNKS:
            raise ImageError(f"found a GIF of over {MAX_CHUNKS} blocks before its image")


def _check_tiff(data: bytes) -> None:
    """Checks a TIFF's first directory, the one that Pillow reads."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    offset, count, entry = (f"{order}{form}" for form in (("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")))
    sizes: dict[int, int] = {}
    try:
        (position,) = struct.unpack_from(offset, data, 8 if big else 4)
        (entries,) = struct.unpack_from(count, data, position)
        position += struct.calcsize(count)
        while entries:
            tag, kind, values, inside = struct.unpack_from(entry, data, position)
            of_bytes = kind in _BYTES and (tag in _TEXTS_AND_TABLES or tag >= 1 << 15)
            if values > MAX_VALUES and not of_bytes:
                raise ImageError(f"found a TIFF with {values} values of tag {tag}, expected at most {MAX_VALUES}")
            if tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT) and kind in _INTEGERS:
                value = int.from_bytes(inside[: _INTEGERS[kind]], "little" if order == "<" else "big")
                sizes[tag] = max(sizes.get(tag, 0), value)
            position += struct.calcsize(entry)
            entries -= 1
    except (struct.error, OverflowError):  # the file ends inside its directory
        pass
    width, height, tile_width, tile_height = (sizes.get(n, 0) for n in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
    if tile_width * tile_height > max(MAX_TILE, 2 * width * height):
        raise ImageError(f"found a TIFF of {width}x{height} pixels in tiles of {tile_width}x{tile_height}")
