"""A captioner captions paths, bytes, PIL images and arrays with equal results, and compiles once."""

import dataclasses
import functools
import http.server
import io
import pathlib
import threading
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_store import tiny_config, write_store
from trained import Trained

import flaxcap
from flaxcap.commands import evaluate, train
from flaxcap.errors import UserError
from flaxcap.images import decode, fetch
from flaxcap.inference import export, loading
from flaxcap.inference.captioner import Caption, Captioned, Captioner
from flaxcap.models import output_layer
from flaxcap.text.vocabulary import END, SPECIAL, START, Vocabulary

pytestmark = pytest.mark.usefixtures("without_java")

COUNT = 5


@pytest.fixture(scope="module")
def captioner(trained: Trained) -> Captioner:
    return flaxcap.load(trained.workdir, data_dir=trained.data_dir)


def pixels(seed: int, rows: int = 60, columns: int = 80) -> np.ndarray:
    patches = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(patches).resize((columns, rows), Image.Resampling.NEAREST))


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def paths(tmp_path) -> list[pathlib.Path]:
    found = [tmp_path / f"{seed}.png" for seed in range(COUNT)]
    for seed, path in enumerate(found):
        path.write_bytes(png(pixels(seed)))
    return found


def assert_equal(found: Caption, expected: Caption) -> None:
    assert found[:3] == expected[:3]
    np.testing.assert_array_equal(found.attention, expected.attention)


def test_every_kind_of_image_gets_the_same_caption(captioner, paths):
    expected = captioner.caption(paths)
    assert len({caption.log_prob for caption in expected}) == COUNT
    kinds = {
        "names": [str(path) for path in paths],
        "bytes": [path.read_bytes() for path in paths],
        "arrays": [pixels(seed) for seed in range(COUNT)],
        "PIL images": [Image.fromarray(pixels(seed)) for seed in range(COUNT)],
    }
    for images in kinds.values():
        for found, caption in zip(captioner.caption(images), expected, strict=True):
            assert_equal(found, caption)
    mixed = [list(images)[n % len(kinds)] for n, images in enumerate(zip(*kinds.values(), strict=True))]
    for found, caption in zip(captioner.caption(iter(mixed)), expected, strict=True):
        assert_equal(found, caption)
    for found, caption in zip(captioner.stream([lambda p=p: p.read_bytes() for p in paths]), expected, strict=True):
        assert_equal(found.caption, caption)


def test_an_address_is_captioned(captioner, paths, monkeypatch):
    """The test server is on this machine, whose addresses are refused otherwise."""
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=paths[0].parent)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            found = captioner.caption(f"http://127.0.0.1:{server.server_address[1]}/{paths[1].name}")
        finally:
            server.shutdown()
            thread.join()
    assert_equal(found, captioner.caption(paths[1]))


def test_one_image_gives_one_caption_and_several_a_list(captioner, paths):
    for image in (paths[0], str(paths[0]), paths[0].read_bytes(), pixels(0), Image.fromarray(pixels(0))):
        one, (listed,) = captioner.caption(image), captioner.caption([image])
        assert isinstance(one, Caption)
        assert_equal(one, listed)
    assert captioner.caption([]) == []
    many = captioner.caption(paths * 4)  # more than a batch
    assert len(many) == 4 * COUNT > captioner.batch_size
    for n, found in enumerate(many):
        assert_equal(found, many[n % COUNT])


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_text_words_and_attention_agree(captioner, paths, method):
    config = dataclasses.replace(captioner.config, decode=dataclasses.replace(captioner.config.decode, method=method))
    for found in dataclasses.replace(captioner, config=config).caption(paths):
        assert found.text == " ".join(found.words)
        assert found.words
        assert set(found.words) <= set(captioner.vocabulary.tokens) - set(SPECIAL)
        assert found.log_prob < 0
        assert found.attention.dtype == np.float32
        assert found.attention.shape == (len(found.words), captioner.encoder.positions)
        assert (found.attention >= 0).all()
        np.testing.assert_allclose(found.attention.sum(1), 1, atol=1e-5)


def test_log_prob_is_the_teacher_forced_one(captioner, paths):
    """Scores the caption's tokens with the decoder itself."""
    found = captioner.caption(paths[0])
    tokens = [START, *(captioner.vocabulary.ids[word] for word in found.words), END]
    pixels_YX3 = decode.for_encoder(paths[0].read_bytes(), captioner.encoder.preprocess)
    feats_IPF = jax.device_put(captioner._encode(pixels_YX3[None]), jax.devices()[0])
    decoder = captioner.bind(captioner.params)
    states, alpha_TICP = decoder(feats_IPF, np.array([[tokens[:-1]]], np.int32))
    log_probs = jax.nn.log_softmax(output_layer.logits(decoder.output_weights(), states))[:, 0, 0]
    expected = sum(log_probs[t, token] for t, token in enumerate(tokens[1:]))
    assert found.log_prob == pytest.approx(float(expected), abs=1e-3)
    np.testing.assert_allclose(found.attention, alpha_TICP[:-1, 0, 0], atol=1e-4)


def test_a_word_with_an_unusual_space_is_one_word(captioner, paths):
    """A vocabulary may come from a stranger; `str.split` would split at such a space."""
    strange = Vocabulary([*SPECIAL, *(f"{word}\u3000x" for word in captioner.vocabulary.tokens[len(SPECIAL) :])])
    found = dataclasses.replace(captioner, vocabulary=strange).caption(paths[0])
    assert found.words == tuple(f"{word}\u3000x" for word in captioner.caption(paths[0]).words)
    assert len(found.attention) == len(found.words)


def test_an_unreadable_image_is_named(captioner, paths, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:-60])
    for images, message in (
        (tmp_path / "none.png", rf"{tmp_path}/none\.png: cannot be read: No such file"),
        ([paths[0], str(broken)], rf"^{broken}: damaged"),
        ([paths[0], b"text"], r"^image 1: not an image"),
        (np.zeros((4, 4, 3)), r"^image 0: found an array float64 \[4, 4, 3\], expected uint8"),
        ([paths[0], Image.new("F", (5, 5))], r"^image 1: found floating-point pixels"),
        ("http://127.0.0.1:1/a.png", r"^http://127\.0\.0\.1:1/a\.png: 127\.0\.0\.1 is not a public address"),
    ):
        with pytest.raises(UserError, match=message) as error:
            captioner.caption(images)
        assert str(error.value).count("none.png") <= 1
    found = list(captioner.stream([broken, paths[0], b""]))
    assert [item.caption is None for item in found] == [True, False, True]
    assert [bool(item.reason) for item in found] == [True, False, True]
    assert found[2] == Captioned(None, None, "the file is empty")
    assert_equal(found[1].caption, captioner.caption(paths)[0])


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Yields a list that receives the name of an event for each tracing and compilation."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("count", [1, COUNT])
def test_a_second_call_compiles_nothing(captioner, paths, count, compilations):
    fresh = dataclasses.replace(captioner)
    fresh.caption(paths[:count])
    compiled = [event for event in compilations if event.endswith("backend_compile_duration")]
    assert len(compiled) >= 3  # the encoder, the parameters' preparation, and decoding
    compilations.clear()
    fresh.caption([pixels(seed) for seed in range(10, 10 + count)])
    assert compilations == []
    if count > 1:
        fresh.caption(paths[:2], seed=3)  # other sizes of a group and other seeds need no other program
        assert compilations == []


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Returns a preset, the data directory and the run of a model of imported features."""
    path = tmp_path_factory.mktemp("imported")
    config = tiny_config(epochs=1)
    write_store(path / "data", config)
    train.train(config, path / "run", path / "data")
    return config, path / "data", path / "run"


def test_a_model_of_imported_features_captions_no_images(imported, tmp_path, paths):
    _, data_dir, workdir = imported
    loaded = loading.load(workdir, data_dir=data_dir)
    export.write(loaded, tmp_path / "export")
    assert not (tmp_path / "export" / "encoder").exists()
    for captioner in (loaded, loading.load(tmp_path / "export")):
        assert captioner.encoder_params is None
        with pytest.raises(
            UserError,
            match=r"64 positions of 6 features an image, imported from nowhere; .* give --npy_dir=DIR",
        ):
            captioner.caption(paths[0])


def test_a_model_of_imported_features_is_evaluated_on_its_store(imported, tmp_path):
    _, data_dir, workdir = imported
    loaded = loading.load(workdir, data_dir=data_dir)
    export.write(loaded, tmp_path / "export")
    scores = [
        evaluate.evaluate(captioner, data_dir, "val", tmp_path / "scores").scores
        for captioner in (loaded, loading.load(tmp_path / "export"))
    ]
    assert scores[0] == scores[1]
    assert {"loss", "CIDEr", "log_prob"} <= set(scores[0])
