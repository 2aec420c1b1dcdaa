"""What an image file's header would have a reader do, looked at before it is read: Pillow bounds the pixels alone.

A few bytes each can make a decoder go over all pixels once more (a scan of a JPEG), or Pillow keep a Python object (a
JPEG's segment, a PNG's chunk, a GIF's comment, a strip of a TIFF) or copy what came before (a JPEG's EXIF, a comment of
a PPM).
"""

import re
import struct

MAX_SEGMENTS = 1_000  # of a JPEG; a colour profile takes up to 255, a depth map about as many
MAX_SCANS = 100  # of a JPEG; progressive ones have about ten
MAX_CHUNKS = 50_000  # of a PNG, or of a GIF before its picture; libpng writes one for 8 kB
MAX_VALUES = 200_000  # of a number in a TIFF's directory; there may be an offset for each row of pixels
MAX_TILE = 1 << 22  # pixels of a TIFF's tile, unless the image is as large

# A JPEG's markers but for restarts (in the midst of a scan) and fill bytes.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_WITHOUT_LENGTH = {0x01, 0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)}
_SCAN, _END = 0xDA, 0xD9

_TEXTS_AND_TABLES = {270, 347, 700}  # TIFF's description, JPEG tables, XMP: bytes, as many as it takes
_BYTES = {1, 2, 7}
_INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}  # TIFF's type -> bytes
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323


class ImageError(ValueError):
    """Bytes that are not a usable image; the message is the reason."""


def check(data: bytes) -> int:
    """How often a decoder goes over the pixels: the scans of a JPEG, else once.

    ImageError for a header out of all proportion. Whether the file is sound otherwise is for its decoder to say.
    """
    if data.startswith(b"\xff\xd8"):
        return _check_jpeg(data)
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)
    elif data.startswith((b"P1", b"P2", b"P3")):
        raise ImageError("a PPM, PGM or PBM of text: expected its binary form")
    return 1


def _check_jpeg(data: bytes) -> int:
    """Goes from marker to marker, as Pillow does up to the first scan, and libjpeg from scan to scan."""
    place, segments, scans = 2, 0, 0
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == _END and scans:
            break
        if marker not in _WITHOUT_LENGTH:
            place += max(2, int.from_bytes(data[place : place + 2]))
        segments += 1
        scans += marker == _SCAN
        if segments > MAX_SEGMENTS:
            raise ImageError(f"a JPEG of over {MAX_SEGMENTS} segments")
        if scans > MAX_SCANS:
            raise ImageError(f"a JPEG of over {MAX_SCANS} scans")
    return max(scans, 1)


def _check_png(data: bytes) -> None:
    place, chunks = 8, 0
    while place < len(data):
        place += 12 + int.from_bytes(data[place : place + 4])
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise ImageError(f"a PNG of over {MAX_CHUNKS} chunks")


def _check_gif(data: bytes) -> None:
    """Goes from block to block up to the first picture."""
    flags = data[10] if len(data) > 10 else 0
    place, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while place < len(data) and data[place : place + 1] not in (b",", b";"):
        extension = data[place : place + 1] == b"!"
        place += 2 if extension else 1
        while extension and place < len(data) and blocks <= MAX_CHUNKS:
            extension = data[place] > 0
            place += 1 + data[place]
            blocks += 1
        blocks += 1
        if blocks > MAX_CHUNKS:
            raise ImageError(f"a GIF of over {MAX_CHUNKS} blocks before its picture")


def _check_tiff(data: bytes) -> None:
    """Looks at the first directory, as Pillow finds it."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    offset, count, entry = (f"{order}{form}" for form in (("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")))
    sizes: dict[int, int] = {}
    try:
        (place,) = struct.unpack_from(offset, data, 8 if big else 4)
        (entries,) = struct.unpack_from(count, data, place)
        place += struct.calcsize(count)
        while entries:
            tag, kind, values, inside = struct.unpack_from(entry, data, place)
            of_bytes = kind in _BYTES and (tag in _TEXTS_AND_TABLES or tag >= 1 << 15)
            if values > MAX_VALUES and not of_bytes:
                raise ImageError(f"a TIFF with {values} values of its tag {tag}")
            if tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT) and kind in _INTEGERS:
                value = int.from_bytes(inside[: _INTEGERS[kind]], "little" if order == "<" else "big")
                sizes[tag] = max(sizes.get(tag, 0), value)
            place += struct.calcsize(entry)
            entries -= 1
    except (struct.error, OverflowError):  # it ends before its directory does
        pass
    width, height, tile_width, tile_height = (sizes.get(n, 0) for n in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
    if tile_width * tile_height > max(MAX_TILE, 2 * width * height):
        raise ImageError(f"a TIFF of {width}x{height} pixels in tiles of {tile_width}x{tile_height}")
