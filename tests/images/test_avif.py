"""AVIF: decoding, and the bounds of its memory. Skipped where Pillow cannot read it."""

import contextlib
import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from flaxcap.images import avif, decode, headers
from flaxcap.images.decode import ImageError

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")


def encoded(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "AVIF", **options)
    return out.getvalue()


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x * y, 255 * y, 255 * (1 - x)], -1).round().astype(np.uint8)


@pytest.mark.parametrize("quality", [90, 100])
def test_the_pixels_are_the_files(quality):
    data = encoded(Image.fromarray(gradient()), quality=quality, subsampling="4:4:4")
    expected = np.asarray(Image.fromarray(gradient()).resize((32, 32), Image.Resampling.BILINEAR), int)
    assert np.abs(decode.to_square(data, 32).astype(int) - expected).max() < 12


def test_transparent_pixels_become_white():
    data = encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), quality=100)
    assert decode.to_square(data, 8).min() > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """AVIF stores the rotation in its own boxes; the image is turned once."""

    def exif() -> Image.Exif:
        found = Image.Exif()
        found[0x0112] = orientation
        return found

    data = encoded(Image.fromarray(gradient()), quality=95, subsampling="4:4:4", exif=exif())
    png = io.BytesIO()
    Image.fromarray(gradient()).save(png, "PNG", exif=exif())
    found, expected = (decode.to_square(some, 32).astype(int) for some in (data, png.getvalue()))
    assert np.abs(found - expected).max() < 14


def test_the_first_frame_of_an_animation_is_decoded():
    first, second = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    data = encoded(first, save_all=True, append_images=[second], quality=95)
    assert np.abs(decode.to_square(data, 4).astype(int) - [255, 0, 0]).max() < 12
    assert headers.check(data).pixels == 40 * 30


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (97, 61), (1025, 513), (2, 4096)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_frames_size_is_read(size, mode):
    assert headers.check(encoded(Image.new(mode, size), speed=10)).pixels == size[0] * size[1]


def small_box(data: bytes) -> bytes:
    """Returns the file with a size of 10x10 in its box: Pillow believes this size until it decodes."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", 10, 10) + data[at + 8 :]


def test_a_frame_larger_than_its_box_says_is_refused_before_it_is_decoded(monkeypatch):
    data = small_box(encoded(Image.new("RGB", (1200, 1000)), speed=10))
    assert Image.open(io.BytesIO(data)).size == (10, 10)
    assert headers.check(data).pixels == 1_200_000
    monkeypatch.setattr(decode, "_resized", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ImageError, match="a frame of 1200000 pixels is more than the 1000000 allowed"):
        decode.to_square(data, 8, max_pixels=1_000_000)


def test_the_memory_of_the_larger_frame_is_reserved(monkeypatch):
    reserved = []
    reserve = decode._MemoryBudget.reserve
    monkeypatch.setattr(
        decode._MemoryBudget, "reserve", lambda self, size: reserved.append(size) or reserve(self, size)
    )
    decode.to_square(small_box(encoded(Image.new("RGB", (300, 200)), speed=10)), 8)
    assert reserved == [300 * 200 * decode.BYTES_A_PIXEL]


def test_a_frame_may_not_declare_its_size_in_more_bits_than_it_needs():
    """Such a header leaves room for a frame that is larger than the sequence's size."""
    sequence = "0001100000" + f"{15:04b}{15:04b}{99:016b}{49:016b}"
    header = int(sequence.ljust(64, "0"), 2).to_bytes(8)
    assert avif._declared_pixels(header) == 65536 * 65536
    sequence = "0001100000" + f"{6:04b}{5:04b}{99:07b}{49:06b}"
    assert avif._declared_pixels(int(sequence.ljust(64, "0"), 2).to_bytes(8)) == 100 * 50


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


START = box(b"ftyp", b"avif\0\0\0\0avifmif1")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (box(b"free", b"") * 10_002, "an AVIF of over 10000 boxes"),
        (box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", box(b"ispe", bytes(12)) * 10_002))), "over 10000 boxes"),
        (box(b"meta", bytes(4) + box(b"ipma", bytes(2_000_000))), "a table of 2000000 bytes, expected at most 1048576"),
        (box(b"moov", box(b"trak", box(b"stsz", bytes(2_000_000)))), "a table of 2000000 bytes"),
    ],
    ids=["boxes", "properties", "items", "samples"],
)
def test_many_boxes_and_large_tables_are_refused(content, reason):
    with pytest.raises(ImageError, match=reason):
        headers.check(START + content)


def test_a_stream_of_many_units_is_refused():
    stream = b"\x12\0" * 20_000  # temporal delimiters
    item = box(b"infe", b"\2\0\0\0\0\1\0\0av01")
    place = box(b"iloc", b"\0\0\0\0" + bytes([0x44, 0]) + struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(stream)))
    meta = box(b"meta", bytes(4) + box(b"iinf", bytes(4) + b"\0\1" + item) + place)
    place_at = START + meta
    data = place_at.replace(struct.pack(">II", 0, len(stream)), struct.pack(">II", len(place_at) + 8, len(stream)))
    with pytest.raises(ImageError, match="over 10000 OBUs"):
        headers.check(data + box(b"mdat", stream))


def test_damaged_files_are_decoded_or_refused():
    data, draw = encoded(Image.fromarray(gradient()), quality=60), np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data[: draw.integers(1, len(data) + 1)])
        for position in draw.integers(len(broken), size=3):
            broken[position] = draw.integers(256)
        with contextlib.suppress(ImageError):
            assert decode.to_square(bytes(broken), 8).shape == (8, 8, 3)
