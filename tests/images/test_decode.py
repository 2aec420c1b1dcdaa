"""Decoding: formats, colour modes, orientation, size limits, and damaged files."""

import io
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flaxcap.images.decode import ImageError, to_square

SIZE = 32


def gradient(height=48, width=64) -> np.ndarray:
    """Returns a smooth image that every flip and turn changes, uint8 [height, width, 3]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x * y, 255 * y, 255 * (1 - x)], -1).round().astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def close(left, right, tolerance):
    assert left.dtype == np.uint8
    return np.abs(np.asarray(left, int) - np.asarray(right, int)).max() <= tolerance


EXPECTED = np.asarray(Image.fromarray(gradient()).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
PALETTE = Image.new("P", (8, 8), 3)
PALETTE.putpalette(range(30))
GREY = np.repeat(np.asarray(Image.fromarray(EXPECTED).convert("L"))[..., None], 3, 2)


@pytest.mark.parametrize("size", [1, 32, 299])
@pytest.mark.parametrize("shape", [(48, 64), (1, 1), (1, 700)])
def test_any_shape_becomes_the_square(size, shape):
    assert to_square(encode(gradient(*shape), "PNG"), size).shape == (size, size, 3)


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
    ],
)
def test_formats(format, options, tolerance):
    assert close(to_square(encode(gradient(), format, **options), SIZE), EXPECTED, tolerance)


@pytest.mark.parametrize(
    ("mode", "format", "expected", "tolerance"),
    [
        ("L", "PNG", GREY, 2),
        ("L", "JPEG", GREY, 8),
        ("LA", "PNG", GREY, 2),
        ("RGBA", "PNG", EXPECTED, 1),
        ("CMYK", "JPEG", EXPECTED, 16),
        ("CMYK", "TIFF", EXPECTED, 2),
        ("YCbCr", "TIFF", EXPECTED, 4),
        ("LAB", "TIFF", None, 0),
    ],
)
def test_modes(mode, format, expected, tolerance):
    if mode == "LAB":  # Pillow 13 cannot convert RGB to it
        image = Image.new("LAB", (64, 48), (128, 0, 0))
        expected = np.full((SIZE, SIZE, 3), to_square(encode(image, format), SIZE)[0, 0])
    else:
        image = Image.fromarray(gradient()).convert(mode)
    options = {"quality": 95} if format == "JPEG" else {}
    assert close(to_square(encode(image, format, **options), SIZE), expected, tolerance)


def test_palettes():
    image = Image.fromarray(gradient()).quantize(256)
    expected = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert close(to_square(encode(image, "PNG"), SIZE), expected, 0)
    assert close(to_square(encode(image, "GIF"), SIZE), expected, 0)
    black_and_white = Image.fromarray(gradient()[..., 0] > 100)
    assert set(np.unique(to_square(encode(black_and_white, "PNG"), 48))) > {0, 255}


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (8, 8), (200, 0, 0, 0)), {}),
        (Image.new("LA", (8, 8), (7, 0)), {}),
        (PALETTE, {"transparency": 3}),
        (PALETTE, {"transparency": bytes([255, 255, 255, 0])}),
        (Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}),
        (Image.new("L", (8, 8), 9), {"transparency": 9}),
    ],
)
def test_transparent_pixels_become_white(image, options):
    assert (to_square(encode(image, "PNG", **options), 4) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white_and_hidden_colours_do_not_show():
    assert close(to_square(encode(Image.new("RGBA", (8, 8), (200, 0, 0, 128)), "PNG"), 4)[0, 0], [227, 127, 127], 1)
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4] = 0, 0, 255, 255
    half[:, 4:] = 255, 0, 0, 0  # invisible red, which must not bleed into the blue
    red, green, _ = to_square(encode(half, "PNG"), 7).reshape(-1, 3).T
    assert (red == green).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    values = np.linspace(0, 65535, 64).astype(np.uint16)
    values[:2], values[-1] = (128, 129), 65535
    rows = np.tile(values, (64, 1))
    if mode == "I;16":
        data = encode(rows, "PNG")
    elif mode == "I;16B":
        data = b"P5 64 64 65535\n" + rows.astype(">u2").tobytes()
    else:
        data = encode(Image.fromarray(rows.astype(np.int32)), "TIFF")
    expected = np.round(rows / 257)[..., None].repeat(3, 2)
    assert close(to_square(data, 64), expected, 0)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "32-bit"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "32-bit"),
        (Image.fromarray(np.ones((4, 4), np.float32)), "floating-point"),
    ],
)
def test_pixels_without_a_known_range_are_refused(image, reason):
    with pytest.raises(ImageError, match=reason):
        to_square(encode(image, "TIFF"), SIZE)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_decoded(format):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert close(to_square(data, 4), np.full((4, 4, 3), (255, 0, 0)), 1)


TURNS = {  # EXIF's orientation -> the operation that turns the image upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.ascontiguousarray(TURNS[orientation](gradient())))
    expected = upright.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    data = encode(gradient(), format, exif=exif, **({"quality": 95} if format in ("JPEG", "WEBP") else {}))
    assert close(to_square(data, SIZE), expected, 12)


def test_an_image_with_damaged_metadata_is_decoded():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a long description of the image"
    good = exif.tobytes()
    for damaged in (good[:20], good[:-20], good[:8] + b"\xff" * 40, b"Exif\0\0" + b"\0" * 50):
        data = encode(gradient(), "JPEG", quality=95, exif=damaged, icc_profile=b"not a profile")
        assert to_square(data, SIZE).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_reduced_decoding_of_large_jpegs_is_close_to_full_decoding(scale):
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
    image = coarse.resize((scale * 40 + 3, scale * SIZE + 1), Image.Resampling.BICUBIC)
    data = encode(image, "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    difference = np.abs(to_square(data, SIZE).astype(int) - np.asarray(full, int))
    assert difference.mean() < 1
    assert difference.max() <= 8


def bomb(width: int, height: int) -> bytes:
    """Returns a PNG of a hundred bytes whose header declares that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


JPEG, PNG, WEBP, GIF = (encode(gradient(), format) for format in ("JPEG", "PNG", "WEBP", "GIF"))
TIFF = encode(gradient(), "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a", "damaged|not an image"),
        (b"<svg/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\0" * 1000, "not an image"),
        (JPEG[: len(JPEG) * 3 // 4], "truncated"),
        (JPEG[: len(JPEG) // 2], "damaged"),
        (PNG[: len(PNG) // 2], "truncated|damaged"),
        (WEBP[: len(WEBP) // 2], "damaged"),
        (GIF[: len(GIF) // 2], "truncated|damaged"),
        (TIFF[: len(TIFF) // 2], "damaged|not an image"),
        (bomb(8001, 8000), "8001x8000 pixels are more than the 64000000"),
        (bomb(10_000, 10_000), "10000x10000 pixels are more than"),
        (bomb(60_000, 60_000), "too many pixels"),
        (bomb(0, 10), "no pixels|damaged|not an image"),
    ],
)
def test_damaged_files_are_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        to_square(data, SIZE)


def test_the_pixel_limit_is_exact():
    assert to_square(PNG, 4, max_pixels=64 * 48).shape == (4, 4, 3)
    with pytest.raises(ImageError, match="64x48 pixels are more than the 3071 allowed"):
        to_square(PNG, 4, max_pixels=64 * 48 - 1)


def test_warnings_of_pillow_are_ignored_in_every_thread_and_other_warnings_are_not():
    """Decodes files that make Pillow warn in many threads; in these tests a warning is an error."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\0\0\0\x1a\0\0\0"
    odd = encode(gradient(), "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="Tag|EXIF"), Image.open(io.BytesIO(odd)) as image:
        dict(image.getexif())
    huge = bomb(9500, 9500)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(io.BytesIO(huge)):
        pass

    def square(data: bytes) -> np.ndarray:
        return to_square(data, SIZE)

    with ThreadPoolExecutor(8) as pool:
        assert all(result.shape == (SIZE, SIZE, 3) for result in pool.map(square, [odd, PNG, JPEG] * 25))
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        to_square(huge, SIZE, max_pixels=100_000_000)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def assert_decoded_or_refused(data: bytes):
    try:
        result = to_square(data, 8, max_pixels=1_000_000)
    except ImageError as error:
        result = error
    assert str(result) if isinstance(result, ImageError) else result.shape == (8, 8, 3)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([JPEG, PNG, WEBP, GIF, TIFF]),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=0, max_size=8)), max_size=6),
    st.integers(0, 5000),
)
def test_mutated_files_are_decoded_or_refused(data, edits, end):
    mutated = bytearray(data)
    for position, replacement in edits:
        position %= len(mutated)
        mutated[position : position + len(replacement)] = replacement
    if end % 3 == 0:
        del mutated[end:]
    assert_decoded_or_refused(bytes(mutated))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_random_bytes_are_decoded_or_refused(data):
    assert_decoded_or_refused(data)
