"""Untrusted images, made from seeds: sound ones of every format, and broken ones made from these."""

import functools
import io
import itertools
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms, features

SIZES = ((0, 0), (0, 7), (7, 0), (1, 65_000), (9_000, 9_000), (16_383, 16_383), (65_535, 65_535))


def pattern(seed: int, height: int = 90, width: int = 120, channels: int = 3) -> np.ndarray:
    """Returns coloured patches with noise, uint8 `[height, width, channels]`."""
    draw = np.random.default_rng(seed)
    patches = Image.fromarray(draw.integers(0, 256, (4, 5, channels), np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), int)
    return (smooth + draw.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@functools.cache
def sound(seed: int = 0) -> dict[str, bytes]:
    """Returns {file name: file} with every format and mode that Pillow writes. Each file can be captioned."""
    rgb, other = Image.fromarray(pattern(seed)), Image.fromarray(pattern(seed + 1))
    rgba = Image.fromarray(pattern(seed, channels=4))
    grey, palette = rgb.convert("L"), rgb.quantize(64)
    deep = Image.fromarray((np.asarray(grey, np.uint16) * 257)[:, ::-1].copy())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rotated = [Image.Exif() for _ in range(9)]
    for orientation, exif in enumerate(rotated):
        exif[0x0112] = orientation
        exif[0x010E] = "a\0description"
    animated = {"save_all": True, "append_images": [other, rgb], "duration": 50}
    found = {
        "plain.jpg": encoded(rgb, "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True, quality=95, subsampling=0),
        "grey.jpg": encoded(grey, "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "profile.jpg": encoded(rgb, "JPEG", icc_profile=profile, comment=b"a\0comment"),
        "large.jpg": encoded(rgb.resize((1600, 1200)), "JPEG"),
        "plain.png": encoded(rgb, "PNG"),
        "alpha.png": encoded(rgba, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "deep.png": encoded(deep, "PNG"),
        "bits.png": encoded(Image.fromarray(np.asarray(grey) > 99), "PNG"),
        "profile.png": encoded(rgb, "PNG", icc_profile=profile),
        "moving.png": encoded(rgb, "PNG", **animated),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgba, "WEBP", lossless=True),
        "profile.webp": encoded(rgb, "WEBP", icc_profile=profile, exif=rotated[6]),
        "moving.webp": encoded(rgb, "WEBP", **animated),
        "plain.gif": encoded(palette, "GIF"),
        "clear.gif": encoded(palette, "GIF", transparency=3, interlace=1),
        "moving.gif": encoded(palette, "GIF", **animated | {"append_images": [other.quantize(16)]}),
        "plain.bmp": encoded(rgb, "BMP"),
        "plain.ppm": encoded(rgb, "PPM"),
        "strips.tif": encoded(rgb, "TIFF"),
        "packed.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
    }
    if features.check("avif"):
        found |= {
            "plain.avif": encoded(rgb, "AVIF", exif=rotated[6], icc_profile=profile),
            "alpha.avif": encoded(rgba, "AVIF", subsampling="4:4:4"),
            "moving.avif": encoded(rgb, "AVIF", **animated),
        }
    return found | {f"turned{n}.jpg": encoded(rgb, "JPEG", exif=exif) for n, exif in enumerate(rotated)}


def photographs(most: int = 20) -> dict[str, bytes]:
    """Returns JPEG files of the directory `$FLAXCAP_PHOTOS`. Returns none if the variable is not set."""
    folder = os.environ.get("FLAXCAP_PHOTOS")
    files = sorted(pathlib.Path(folder).glob("*.jpg"))[:most] if folder else []
    return {f"photo{n}.jpg": file.read_bytes() for n, file in enumerate(files)}


# Mutations. Each takes a file and a random generator, and returns a broken file.


def _cut(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: draw.integers(len(data))]


def _flip(data: bytes, draw: np.random.Generator) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    positions = draw.integers(len(data), size=draw.integers(1, 30))
    changed[positions] ^= (1 << draw.integers(8, size=len(positions))).astype(np.uint8)
    return changed.tobytes()


def _flip_header(data: bytes, draw: np.random.Generator) -> bytes:
    return _flip(data[:200], draw) + data[200:]


def _nulls(data: bytes, draw: np.random.Generator) -> bytes:
    start, length = draw.integers(len(data)), int(draw.integers(1, 64))
    end = start if draw.random() < 0.5 else start + length  # inserted, or written over
    return data[:start] + bytes(length) + data[end:]


def _drop(data: bytes, draw: np.random.Generator) -> bytes:
    start = draw.integers(len(data))
    return data[:start] + data[start + draw.integers(1, 64) :]


def _repeat(data: bytes, draw: np.random.Generator) -> bytes:
    first, last = np.sort(draw.integers(len(data), size=2))
    return data[:last] + data[first:last] * int(draw.integers(1, 4)) + data[last:]


def _noise(data: bytes, draw: np.random.Generator) -> bytes:
    start, length = draw.integers(len(data)), int(draw.integers(1, 200))
    return data[:start] + draw.bytes(length) + data[start + length :]


def _sizes(data: bytes, draw: np.random.Generator) -> bytes:
    width, height = SIZES[draw.integers(len(SIZES))]
    return with_size(data, width, height)


def _tail(data: bytes, draw: np.random.Generator) -> bytes:
    return data + draw.bytes(int(draw.integers(1, 5000)))


MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "cut": _cut,
    "flip": _flip,
    "header": _flip_header,
    "nulls": _nulls,
    "drop": _drop,
    "repeat": _repeat,
    "noise": _noise,
    "sizes": _sizes,
    "tail": _tail,
    "none": lambda data, _: data,
}


def mutations(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yields `count` files with names NUMBER-MUTATION-ORIGIN. A file with the mutation "none" is sound."""
    originals = sound(seed) | photographs()
    pairs = list(itertools.product(MUTATIONS, originals))
    draw = np.random.default_rng(seed)
    # Each pass over all pairs is shuffled, so that few tries meet many kinds.
    order = itertools.chain.from_iterable(draw.permutation(len(pairs)) for _ in itertools.count())
    for number, pair in zip(range(count), order, strict=False):
        kind, name = pairs[pair]
        yield f"{number:05d}-{kind}-{name}", MUTATIONS[kind](originals[name], np.random.default_rng([seed, number]))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Returns the file with another size in its header. Other formats than those below stay unchanged."""
    if data.startswith(b"\x89PNG"):
        header = struct.pack(">2I", width, height) + data[24:29]
        return data[:8] + png_chunk(b"IHDR", header) + data[33:]
    if data.startswith(b"GIF8"):
        return data[:6] + struct.pack("<2H", width & 0xFFFF, height & 0xFFFF) + data[10:]
    if data.startswith(b"\xff\xd8") and (frame := re.search(rb"\xff[\xc0-\xc2]..\x08", data, re.DOTALL)):
        return data[: frame.end()] + struct.pack(">2H", height & 0xFFFF, width & 0xFFFF) + data[frame.end() + 4 :]
    if data[12:16] == b"VP8X":
        wide, high = (struct.pack("<I", max(0, side - 1))[:3] for side in (width, height))
        return data[:24] + wide + high + data[30:]
    if data[12:16] == b"VP8 ":
        return data[:26] + struct.pack("<2H", width & 0x3FFF, height & 0x3FFF) + data[30:]
    if data[12:16] == b"VP8L":
        bits = (max(0, width - 1) & 0x3FFF) | (max(0, height - 1) & 0x3FFF) << 14
        return data[:21] + struct.pack("<I", bits) + data[25:]
    return data
