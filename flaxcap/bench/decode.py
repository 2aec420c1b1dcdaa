"""`flaxcap bench decode`: captions of made-up features, a batch at a time and one image at a time."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.bench import synthetic
from flaxcap.bench.base import Figures, Given, Work, rates, spread
from flaxcap.config import Config
from flaxcap.decoding import generate
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import END


@contextlib.contextmanager
def work(config: Config, given: Given) -> Iterator[Work]:
    """A repetition decodes `steps` batches, then `steps` single images, each to the preset's greatest length."""
    mesh = sharding.make_mesh()
    dtype = jnp.dtype(config.encoder.store_dtype)
    source = synthetic.MadeUp(given.images, given.positions, given.feature_dim, dtype, config.seed)
    sizes = decoder_lib.Sizes(given.positions, given.feature_dim, synthetic.vocabulary_size(config.data))
    bind, init = decoder_lib.create(config, sizes)
    params = jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(config.seed))
    # No caption ends before its last token: every run does the same work.
    endless = decoder_lib.with_output(bind, lambda weights: output_layer.exclude(weights, slice(END, END + 1)))
    run = generate.Generator(endless, config.decode)
    frozen = run.freeze(params)

    def place(images: int) -> jax.Array:
        """Features where the model is: reading them is not decoding (`flaxcap bench input` measures it)."""
        placed = sharding.over_images(mesh) if images % mesh.size == 0 else sharding.replicated(mesh)
        return jax.device_put(source.read(np.arange(images)), placed)

    batch, compile_s = config.decode.batch_size, {}
    feats = {images: place(images) for images in _settings(batch).values()}

    def caption(number: int, images: int) -> np.ndarray:
        """Tokens of `images` images: decoded, and fetched."""
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return jax.device_get(run(frozen, feats[images], key).tokens_IT)

    for name, images in _settings(batch).items():
        begin = time.perf_counter()
        length = _length(caption(0, images))
        compile_s[name] = time.perf_counter() - begin
        if length != config.decode.max_length:
            raise RuntimeError(f"captions ended at {length} of {config.decode.max_length} tokens")
        for n in range(1, given.warmup):
            caption(n, images)

    def repeat() -> Figures:
        found = {name: _timed(caption, images, given.steps) for name, images in _settings(batch).items()}
        return found["batch"] | ({"one_image": found["one_image"]} if "one_image" in found else {})

    facts = {
        "method": config.decode.method,
        "batch": batch,
        "tokens_a_caption": config.decode.max_length,
        "compile_s": compile_s,
    }
    yield Work("captions_s", facts, repeat)


def _settings(batch: int) -> dict[str, int]:
    return {"batch": batch} | ({"one_image": 1} if batch > 1 else {})


def _length(tokens_IT: np.ndarray) -> int:
    """Tokens of the shortest caption, <end> included."""
    ends_IT = tokens_IT == END
    return int(np.where(ends_IT.any(1), ends_IT.argmax(1) + 1, tokens_IT.shape[1]).min())


def _timed(caption: Callable[[int, int], np.ndarray], images: int, calls: int) -> Figures:
    call_ms, tokens = [], 0
    begin = last = time.perf_counter()
    for n in range(calls):
        tokens += caption(n, images).size
        now = time.perf_counter()
        call_ms.append(1e3 * (now - last))
        last = now
    seconds = last - begin
    return {
        "seconds": seconds,
        "captions": calls * images,
        "tokens": tokens,
        **rates(seconds, captions=calls * images, tokens=tokens),
        "ms_a_caption": 1e3 * seconds / (calls * images),
        "call_ms": spread(call_ms),
    }
