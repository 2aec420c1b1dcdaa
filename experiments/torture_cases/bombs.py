"""Bombs: files of allowed size that are made to take all memory, or hours, of a program that decodes them."""

import functools
import struct
import zlib
from collections.abc import Callable

from PIL import Image
from torture_cases import images as torture_images
from torture_cases.images import encoded, pattern, png_chunk, with_size

from flaxcap.files import size_limits

MOST = size_limits.IMAGE


def _png(width: int, height: int, pixels: bytes, *before: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    """Returns `count` zeros, compressed."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(count >> 20)), packer.flush()])


def _filled(start: bytes, piece: bytes, end: bytes) -> bytes:
    """Returns a file of the largest allowed size, filled with copies of `piece`."""
    return start + piece * ((MOST - len(start) - len(end)) // len(piece)) + end


def _jpeg(side: int = 64, **options) -> bytes:
    return encoded(Image.fromarray(pattern(0, side, side)), "JPEG", **options)


def _parts(jpeg: bytes) -> tuple[bytes, bytes]:
    """Returns the header, and the rest from the first scan on."""
    scan = jpeg.index(b"\xff\xda")
    return jpeg[:scan], jpeg[scan:]


def many_scans(count: int = 3_000_000, side: int = 8000) -> bytes:
    """Returns a progressive JPEG with empty scans. Each has ten bytes, and its decoding visits all pixels."""
    header, scans = _parts(with_size(_jpeg(progressive=True), side, side))
    empty = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0"
    return (header + scans[:-2])[: MOST - 2] + empty * min(count, (MOST - len(header) - len(scans)) // 10) + b"\xff\xd9"


def _many_segments() -> bytes:
    header, scans = _parts(_jpeg())
    return _filled(header, b"\xff\xe5\0\x02", scans)


def _exif_in_pieces() -> bytes:
    """Returns EXIF in many segments. Pillow joins them, and copies all earlier ones for each."""
    header, scans = _parts(_jpeg())
    large = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)
    return _filled(header + large * 256, b"\xff\xe1\0\x09Exif\0\0\0", scans)


def _many_chunks() -> bytes:
    png = encoded(pattern(0), "PNG")
    return _filled(png[:33], png_chunk(b"teSt", b""), png[33:])


def _packed_text() -> bytes:
    packed = _zeros(1 << 26)
    texts = [png_chunk(b"zTXt", b"a%d\0\0" % n + packed) for n in range(100)]
    return _png(8, 8, zlib.compress(bytes(25 * 8)), *texts)


def _packed_profile() -> bytes:
    return _png(8, 8, zlib.compress(bytes(25 * 8)), png_chunk(b"iCCP", b"p\0\0" + _zeros(1 << 26)))


def _tiff(entries: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """Returns a little-endian TIFF with one directory.

    Args:
      entries: (tag, type, count, value or offset) of each.
      data: follows the directory.
    """
    directory = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + data


def _many_strips() -> bytes:
    """Returns a TIFF whose list of offsets is as long as the file. Pillow makes a tile for each."""
    count = MOST // 4 - 100
    size = [(256, 3, 1, 8), (257, 4, 1, 60_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    return _tiff([*size, (273, 4, count, 8 + 2 + 12 * 7 + 4), (278, 3, 1, 1)], bytes(4 * count))


def _large_tiles() -> bytes:
    """Returns a TIFF of 10x10 pixels in one tile of 40,000x40,000."""
    packed = _zeros(1_600_000_000)
    size = [(256, 3, 1, 10), (257, 3, 1, 10), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tile = [(322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8 + 2 + 12 * 10 + 4), (325, 4, 1, len(packed))]
    return _tiff([*size, *tile], packed)


def _tags_with_one_value() -> bytes:
    """Returns a TIFF with 20,000 tags that share one value of a megabyte."""
    size = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 3, 1, 8),
    ]
    return _tiff([*size, *((tag, 7, 1 << 20, 100) for tag in range(40_000, 60_000))], bytes(1 << 20))


def _run_lengths() -> bytes:
    """Returns a BMP in run lengths whose lines all end at once."""
    header = struct.pack("<L2lHHL5L", 40, 8000, 8000, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = b"".join(struct.pack("<L", n * 0x10203) for n in range(256))
    start = 14 + len(header) + len(palette)
    return _filled(b"BM" + struct.pack("<LHHL", MOST, 0, 0, start) + header + palette, b"\1\1\0\0", b"\0\1")


def _comments() -> bytes:
    """Returns a text PGM of comments. Pillow copies the rest of the file for each."""
    return _filled(b"P2 1000 1000 255\n", b"#\n", b"1 ")


def _gif_comments() -> bytes:
    gif = encoded(Image.fromarray(pattern(0)).quantize(16), "GIF")
    first = 13 + 3 * 2 ** ((gif[10] & 7) + 1)  # behind the header and the palette
    return _filled(gif[:first] + b"!\xfe", b"\2ab", b"\0" + gif[first:])


def _all_pixels(format: str, mode: str, **options) -> Callable[[], bytes]:
    return lambda: encoded(Image.new(mode, (8000, 8000)), format, **options)


@functools.cache
def _all_but_the_end() -> bytes:
    """Returns a PNG with the largest allowed number of pixels, cut off before the last ones."""
    return _all_pixels("PNG", "RGBA", compress_level=1)()[:-1000]


# Name -> (makes the file, the file may be decoded). Memory and time are bounded for all.
BOMBS: dict[str, tuple[Callable[[], bytes], bool]] = {
    "60000x60000.png": (lambda: _png(60_000, 60_000, _zeros(1 << 24)), False),
    "12000x12000.png": (lambda: _png(12_000, 12_000, _zeros(12_000 * 36_001)), False),
    "8000x8001.png": (lambda: _png(8000, 8001, _zeros(8000 * 24_001)), False),
    "65535x65535.gif": (lambda: with_size(torture_images.sound()["plain.gif"], 65_535, 65_535), False),
    "65500x65500.jpg": (lambda: with_size(_jpeg(), 65_500, 65_500), False),
    "16383x16383.webp": (lambda: with_size(torture_images.sound()["lossless.webp"], 16_383, 16_383), False),
    "canvas.webp": (lambda: with_size(torture_images.sound()["moving.webp"], 1 << 24, 250), False),
    "scans.jpg": (many_scans, False),
    "segments.jpg": (_many_segments, False),
    "exif.jpg": (_exif_in_pieces, False),
    "chunks.png": (_many_chunks, False),
    "text.png": (_packed_text, False),
    "profile.png": (_packed_profile, False),
    "strips.tif": (_many_strips, False),
    "tiles.tif": (_large_tiles, False),
    "tags.tif": (_tags_with_one_value, True),
    "runs.bmp": (_run_lengths, True),
    "comments.ppm": (_comments, False),
    "comments.gif": (_gif_comments, False),
    "too_long.jpg": (lambda: _jpeg() + bytes(MOST), False),
    "hundred_scans.jpg": (lambda: many_scans(90), True),
    "colours.webp": (_all_pixels("WEBP", "RGBA", lossless=True, quality=0, method=0), True),
    "lossy.webp": (_all_pixels("WEBP", "RGB", method=0), True),
    "colours.png": (_all_pixels("PNG", "RGBA", compress_level=1), True),
    "palette.gif": (_all_pixels("GIF", "P", transparency=0), True),
    "print.jpg": (_all_pixels("JPEG", "CMYK", progressive=True, subsampling=0), True),
    "packed.tif": (_all_pixels("TIFF", "RGBA", compression="tiff_deflate"), True),
    "deep.tif": (_all_pixels("TIFF", "I", compression="tiff_deflate"), True),
    # Twelve in a row: the error of one must not keep its pixels in memory.
    **{f"cut{number}.png": (_all_but_the_end, True) for number in range(12)},
}
