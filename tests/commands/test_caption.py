"""Captions, log-probabilities and attention plots of images from any source."""

import dataclasses
import io
import pathlib
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image
from trained import Trained

from flaxcap.commands import caption
from flaxcap.commands.main import main
from flaxcap.images import decode as decode_lib
from flaxcap.inference import loading
from flaxcap.inference.captioner import Captioner


def png(seed: int, height: int = 120, width: int = 160) -> bytes:
    """Returns an image of a few coloured patches, different for each seed."""
    patches = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def huge_png(side: int = 30_000) -> bytes:
    """Returns a small file of 900 million pixels."""
    chunks = [(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(10**6)))]
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def captioner(trained: Trained) -> Captioner:
    return loading.load_run(trained.workdir, trained.data_dir)


def decoding(captioner: Captioner, **changes) -> Captioner:
    decode = dataclasses.replace(captioner.config.decode, **changes)
    return dataclasses.replace(captioner, config=dataclasses.replace(captioner.config, decode=decode))


def images(count: int) -> list:
    return [(f"{n}.png", lambda n=n: png(n)) for n in range(count)]


def test_unreadable_images_get_a_reason_and_others_a_caption(captioner, tmp_path):
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(png(1)[:-60])
    sources = images(5)
    sources[1:1] = [("bomb.png", huge_png), ("rubbish.jpg", lambda: b"rubbish"), ("empty.png", bytes)]
    private = "http://127.0.0.1:1/image.png"
    sources += caption.from_sources([str(truncated), private])
    found = list(caption.caption(captioner, sources))
    assert [f.name for f in found] == [name for name, _ in sources]
    reasons = {f.name: f.reason for f in found if f.reason}
    assert list(reasons) == ["bomb.png", "rubbish.jpg", "empty.png", str(truncated), private]
    for name, reason in zip(
        reasons, ("pixels", "not an image", "empty", "damaged", "not a public address"), strict=True
    ):
        assert reason in reasons[name]
    alone = {f.name: f for f in caption.caption(captioner, images(5))}
    assert [(f.caption, f.log_prob) for f in found if not f.reason] == [(f.caption, f.log_prob) for f in alone.values()]
    assert all(not f.caption and not f.log_prob and not f.plot for f in found if f.reason)


def test_only_unreadable_images(captioner):
    found = list(caption.caption(captioner, [("a", bytes), ("b", bytes)]))
    assert [f.reason for f in found] == ["the file is empty"] * 2


def test_captions_do_not_depend_on_the_batch(captioner):
    together = list(caption.caption(captioner, images(11)))  # a batch of eight, and one with three images and padding
    encoder = dataclasses.replace(captioner.config.encoder, batch_size=1)
    single = dataclasses.replace(captioner, config=dataclasses.replace(captioner.config, encoder=encoder))
    alone = list(caption.caption(single, images(11)))
    assert [f.name for f in together] == [name for name, _ in images(11)]
    assert [f.caption for f in together] == [f.caption for f in alone]
    np.testing.assert_allclose([f.log_prob for f in together], [f.log_prob for f in alone], atol=0.02)
    # Captions depend on the images.
    assert len({f.caption for f in together}) > 1
    assert len({round(f.log_prob, 3) for f in together}) == 11


def captions(captioner: Captioner, seed: int = 0) -> list[tuple[str, float]]:
    return [(f.caption, f.log_prob) for f in caption.caption(captioner, images(8), seed=seed)]


def test_samples_depend_on_the_seed(captioner):
    sampler = decoding(captioner, method="sample")
    first = captions(sampler)
    assert first == captions(sampler)
    other = captions(sampler, seed=1)
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 4


def test_sampling_from_one_word_is_greedy_and_a_high_temperature_lowers_the_probability(captioner):
    greedy = captions(captioner)
    assert captions(decoding(captioner, method="sample", top_k=1)) == greedy
    warm, hot = (captions(decoding(captioner, method="sample", temperature=t)) for t in (0.5, 5.0))
    # The log-probability is that of the model at temperature 1.
    means = [np.mean([log_prob / (len(text.split()) + 1) for text, log_prob in c]) for c in (greedy, warm, hot)]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[2] > 1


def test_thumbnails_are_upright_and_keep_their_aspect():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    assert np.array_equal(decode_lib.to_thumbnail(out.getvalue()), np.rot90(pixels, -1))
    assert decode_lib.to_thumbnail(out.getvalue(), 30).shape == (30, 10, 3)
    assert decode_lib.to_thumbnail(out.getvalue(), 1).shape == (1, 1, 3)


def test_attention_is_plotted_over_the_image(captioner, tmp_path, monkeypatch):
    sources = [("http://host/wide%20one.png?x=1", lambda: png(1, 60, 240)), ("bad", bytes)]
    sources += [("../tall.png", lambda: png(2, 1200, 600)), ("", lambda: png(3))]
    drawn = []
    plot = caption.plots.attention_plot

    def spy(image, text, words, *args):
        assert text == " ".join(words)
        drawn.append((image, list(words)))
        plot(image, text, words, *args)

    monkeypatch.setattr(caption.plots, "attention_plot", spy)
    found = [f for f in caption.caption(captioner, sources, plot_dir=tmp_path / "plots") if not f.reason]
    paths = [pathlib.Path(f.plot) for f in found]
    assert [p.name for p in paths] == ["0000-wide_20one.png", "0002-tall.png", "0003-image.png"]
    assert sorted((tmp_path / "plots").iterdir()) == paths
    assert [words for _, words in drawn] == [f.caption.split() for f in found]
    assert [image.size for image, _ in drawn] == [(240, 60), (240, 480), (160, 120)]
    for (image, _), seed in zip(drawn, (1, 2, 3), strict=True):
        whole = Image.open(io.BytesIO(png(seed))).resize((4, 3), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(image.resize((4, 3), Image.Resampling.NEAREST)), np.asarray(whole))
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert 300 < image.width < 2000
            assert 100 < image.height < 3000


def test_a_directory_is_captioned_and_the_rest_reported(trained: Trained, tmp_path, capsys):
    """The status is 1 for a dead link. Files that are no images do not change it."""
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(png(1))).save(jpeg, "JPEG")
    for name in ("b.jfif", "a.jpe", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg.getvalue())
    (tmp_path / "notes.txt").write_text("a dog")
    command = ["caption", str(tmp_path), f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(tmp_path / name) for name in ("a.jpe", "b.jfif")]
    skipped, subdirectory = err.splitlines()
    assert re.fullmatch(r"flaxcap caption: skipped 1 file: not an image \(expected JPEG.*\): 'notes\.txt'", skipped)
    assert subdirectory.startswith("flaxcap caption: 1 subdirectory was not read: ")
    (tmp_path / "dead.jpg").symlink_to("gone.jpg")
    assert main([*command, "--recursive"]) == 1
    out, err = capsys.readouterr()
    expected = [str(tmp_path / name) for name in ("a.jpe", "b.jfif", "sub/c.jpg")]
    assert [line.split(": ")[0] for line in out.splitlines()] == expected
    assert f"{tmp_path / 'dead.jpg'}: a dead link: there is no gone.jpg" in err.splitlines()


def test_a_model_that_encodes_images_takes_no_maps(trained: Trained, tmp_path, capsys):
    source = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}", f"--npy_dir={tmp_path}"]
    assert main(["caption", "photo.jpg", *source]) == 1
    assert "--npy_dir: found a model that encodes images, expected one that was trained on" in capsys.readouterr().err
