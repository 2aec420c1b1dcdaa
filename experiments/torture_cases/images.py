"""Pictures as strangers send them: sound ones of every kind, broken ones made of these, and bombs. All from seeds."""

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
from PIL import Image, ImageCms

SIZES = ((0, 0), (0, 7), (7, 0), (1, 65_000), (9_000, 9_000), (16_383, 16_383), (65_535, 65_535))


def picture(seed: int, height: int = 90, width: int = 120, channels: int = 3) -> np.ndarray:
    """Coloured patches with some noise, uint8 [height, width, channels]."""
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
    """{file name: file}: what Pillow writes of each format and mode; any of them can be captioned."""
    rgb, other = Image.fromarray(picture(seed)), Image.fromarray(picture(seed + 1))
    rgba = Image.fromarray(picture(seed, channels=4))
    grey, palette = rgb.convert("L"), rgb.quantize(64)
    deep = Image.fromarray((np.asarray(grey, np.uint16) * 257)[:, ::-1].copy())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = [Image.Exif() for _ in range(9)]
    for orientation, exif in enumerate(turned):
        exif[0x0112] = orientation
        exif[0x010E] = "a\0description"
    moving = {"save_all": True, "append_images": [other, rgb], "duration": 50}
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
        "moving.png": encoded(rgb, "PNG", **moving),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgba, "WEBP", lossless=True),
        "profile.webp": encoded(rgb, "WEBP", icc_profile=profile, exif=turned[6]),
        "moving.webp": encoded(rgb, "WEBP", **moving),
        "plain.gif": encoded(palette, "GIF"),
        "clear.gif": encoded(palette, "GIF", transparency=3, interlace=1),
        "moving.gif": encoded(palette, "GIF", **moving | {"append_images": [other.quantize(16)]}),
        "plain.bmp": encoded(rgb, "BMP"),
        "plain.ppm": encoded(rgb, "PPM"),
        "strips.tif": encoded(rgb, "TIFF"),
        "packed.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
    }
    return found | {f"turned{n}.jpg": encoded(rgb, "JPEG", exif=exif) for n, exif in enumerate(turned)}


def photographs(most: int = 20) -> dict[str, bytes]:
    """Some JPEGs of the directory that $FLAXCAP_PHOTOS names, if it names one."""
    folder = os.environ.get("FLAXCAP_PHOTOS")
    files = sorted(pathlib.Path(folder).glob("*.jpg"))[:most] if folder else []
    return {f"photo{n}.jpg": file.read_bytes() for n, file in enumerate(files)}


# Mutations: each takes a file and a source of chance, and gives a broken one.


def _cut(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: draw.integers(len(data))]


def _flip(data: bytes, draw: np.random.Generator) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    places = draw.integers(len(data), size=draw.integers(1, 30))
    changed[places] ^= (1 << draw.integers(8, size=len(places))).astype(np.uint8)
    return changed.tobytes()


def _flip_header(data: bytes, draw: np.random.Generator) -> bytes:
    return _flip(data[:200], draw) + data[200:]


def _nulls(data: bytes, draw: np.random.Generator) -> bytes:
    place, length = draw.integers(len(data)), int(draw.integers(1, 64))
    after = place if draw.random() < 0.5 else place + length  # put in, or written over
    return data[:place] + bytes(length) + data[after:]


def _drop(data: bytes, draw: np.random.Generator) -> bytes:
    place = draw.integers(len(data))
    return data[:place] + data[place + draw.integers(1, 64) :]


def _repeat(data: bytes, draw: np.random.Generator) -> bytes:
    first, last = np.sort(draw.integers(len(data), size=2))
    return data[:last] + data[first:last] * int(draw.integers(1, 4)) + data[last:]


def _noise(data: bytes, draw: np.random.Generator) -> bytes:
    place, length = draw.integers(len(data)), int(draw.integers(1, 200))
    return data[:place] + draw.bytes(length) + data[place + length :]


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
    """`count` files and their names, NUMBER-MUTATION-ORIGIN; those of the mutation "none" are sound."""
    originals = sound(seed) | photographs()
    pairs = list(itertools.product(MUTATIONS, originals))
    draw = np.random.default_rng(seed)
    # Each run through all pairs has an order of its own, so that few tries meet many kinds.
    order = itertools.chain.from_iterable(draw.permutation(len(pairs)) for _ in itertools.count())
    for number, place in zip(range(count), order, strict=False):
        kind, name = pairs[place]
        yield f"{number:05d}-{kind}-{name}", MUTATIONS[kind](originals[name], np.random.default_rng([seed, number]))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header; formats that hold it elsewhere stay as they are."""
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
