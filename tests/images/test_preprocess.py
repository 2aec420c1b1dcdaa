"""Images become an encoder's input: centre crop, resampling and normalisation, from files, PIL images and arrays."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from flaxcap.encoders import base
from flaxcap.images import decode
from flaxcap.images.decode import ImageError
from flaxcap.images.preprocess import Preprocess, centre

SIZE = 48
CROPPED = Preprocess(SIZE, crop=0.9, resample="bicubic")
SHAPES = [(300, 400), (500, 120), (120, 500), (48, 48), (20, 31), (1, 1), (1, 200)]  # rows and columns


def smooth(rows: int, columns: int) -> Image.Image:
    """Returns an image that changes under every flip and rotation."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def by_pillow(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Returns the centre square, resized to the encoder's size."""
    side = preprocess.crop * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side) if preprocess.crop else None
    size = preprocess.size, preprocess.size
    return np.asarray(image.resize(size, Image.Resampling[preprocess.resample.upper()], box))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [0.0, 0.5, 0.9, 1.0])
def test_files_are_cropped_and_resized_as_by_pillow(crop, resample, shape):
    preprocess, image = Preprocess(SIZE, crop, resample), smooth(*shape)
    found = decode.for_encoder(file_of(image), preprocess)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, by_pillow(image, preprocess))


@pytest.mark.parametrize("shape", [(320, 400), (640, 160), (160, 640)])
def test_the_crop_equals_a_resize_followed_by_a_crop(shape):
    """timm resizes the shorter side to size / crop, then cuts out the centre. These shapes give whole pixels."""
    image, preprocess = smooth(*shape), CROPPED._replace(crop=0.75)
    scale = SIZE / preprocess.crop / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = ((n - SIZE) // 2 for n in resized.size)
    expected = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), int)
    assert np.abs(decode.for_encoder(file_of(image), preprocess) - expected).max() <= 1


def test_only_the_crop_is_seen():
    """Red borders outside of the crop leave no trace; bicubic resampling reads at most 2 output pixels beyond it."""
    image = Image.new("RGB", (400, 200), "red")
    left, top, right, bottom = centre(400, 200, 0.5)
    assert (left, top, right, bottom) == (150, 50, 250, 150)
    margin = 2 * 100 // SIZE + 1
    image.paste((0, 0, 255), (150 - margin, 50 - margin, 250 + margin, 150 + margin))
    found = decode.for_encoder(file_of(image), Preprocess(SIZE, 0.5, "bicubic"))
    np.testing.assert_array_equal(found, np.full((SIZE, SIZE, 3), (0, 0, 255)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(200, 300), (300, 150)])
@pytest.mark.parametrize("crop", [0.0, 0.7])
def test_the_crop_of_a_rotated_photo_is_that_of_the_upright_image(crop, shape, orientation):
    image, exif = smooth(*shape), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    preprocess = CROPPED._replace(crop=crop)
    upright = image.transpose(decode._UPRIGHT[orientation]) if orientation > 1 else image
    expected = by_pillow(upright, preprocess).astype(int)
    data = file_of(image, exif=exif)
    assert np.abs(decode.for_encoder(data, preprocess) - expected).max() <= 1  # rounded in another order
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(decode.for_encoder(opened, preprocess), decode.for_encoder(data, preprocess))


@pytest.mark.parametrize("shape", [(1200, 1600), (797, 2401), (3001, 803)])
@pytest.mark.parametrize("crop", [0.0, 0.4, 0.9])
def test_a_reduced_jpeg_has_nearly_the_pixels_of_a_complete_decoding(crop, shape, monkeypatch):
    image, preprocess = smooth(*shape), CROPPED._replace(crop=crop)
    data = file_of(image, "JPEG", quality=95)
    sizes, resized = [], decode._resized
    monkeypatch.setattr(decode, "_resized", lambda image, *a: sizes.append(image.size) or resized(image, *a))
    found = decode.for_encoder(data, preprocess).astype(int)
    assert sizes[0][0] < image.width
    assert min(sizes[0]) * (crop or 1) >= 2 * SIZE - 1
    with Image.open(io.BytesIO(data)) as opened:
        expected = by_pillow(opened, preprocess)
    difference = np.abs(found - expected)
    assert difference.mean() < 1
    assert difference.max() <= 8
    shifted = np.abs(found[:, 1:] - expected[:, :-1])  # the tolerance is smaller than a shift by one pixel
    assert shifted.mean() > 2 * difference.mean()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("preprocess", [CROPPED, Preprocess(SIZE)])
def test_pil_images_have_the_pixels_of_their_files(mode, preprocess):
    image = smooth(70, 90)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90)) if mode == "I;16" else image.convert(mode)
    data = file_of(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(decode.for_encoder(image, preprocess), decode.for_encoder(data, preprocess))


@pytest.mark.parametrize("preprocess", [CROPPED, Preprocess(SIZE)])
@pytest.mark.parametrize("channels", [3, 4, None])
def test_arrays_have_the_pixels_of_their_files(channels, preprocess):
    shape = (70, 90) if channels is None else (70, 90, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = decode.for_encoder(file_of(Image.fromarray(pixels)), preprocess)
    np.testing.assert_array_equal(decode.for_encoder(pixels, preprocess), expected)
    strided = np.asfortranarray(pixels)[::-1][::-1]
    np.testing.assert_array_equal(decode.for_encoder(strided, preprocess), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"found an array float32 \[4, 4, 3\], expected uint8 \[Y, X, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"found an array uint8 \[4, 4, 2\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"found an array uint8 \[2, 4, 4, 3\]"),
        (np.zeros(4, np.uint8), r"found an array uint8 \[4\]"),
        (np.zeros((0, 5, 3), np.uint8), "the image has no pixels"),
        (Image.new("RGB", (0, 5)), "the image has no pixels"),
        (Image.new("F", (5, 5)), "floating-point pixels"),
    ],
)
def test_images_that_cannot_be_used_are_refused(image, message):
    with pytest.raises(ImageError, match=message):
        decode.for_encoder(image, CROPPED)


def test_a_damaged_file_behind_a_pil_image_is_refused():
    damaged = io.BytesIO(file_of(smooth(200, 200))[:-3000])
    with Image.open(damaged) as opened, pytest.raises(ImageError, match="damaged: "):
        decode.for_encoder(opened, CROPPED)


def test_the_description_holds_every_field():
    preprocess = Preprocess(48, 0.9, "bicubic", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    found = decode.describe(preprocess)
    assert found.pop("decoding") == decode.DECODING
    assert found == {"size": 48, "crop": 0.9, "resample": "bicubic", "mean": [1, 2, 3], "std": [4, 5, 6]}


def test_pixels_are_normalised_by_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    preprocess = Preprocess(4, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    expected = (pixels.astype(np.float64) - preprocess.mean) / preprocess.std
    np.testing.assert_allclose(base.normalise(pixels, preprocess, np.float32), expected, atol=1e-6)
    assert base.normalise(pixels, preprocess, "bfloat16").dtype == "bfloat16"
