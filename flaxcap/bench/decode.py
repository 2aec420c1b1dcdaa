"""`flaxcap bench decode`: captions of synthetic features, for batches and for single images."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.bench import synthetic
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates, spread
from flaxcap.config import Config
from flaxcap.decoding import generate
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import END


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times `steps` batches, then `steps` single images. Every caption has the preset's greatest length."""
    batch = config.decode.batch_size
    settings = {"batch": batch} | ({"one_image": 1} if batch > 1 else {})
    captioner = _EndlessCaptioner(config, args, settings.values())
    compile_s = {}
    for name, images in settings.items():
        begin = time.perf_counter()
        length = _shortest(captioner.caption(0, images))
        compile_s[name] = time.perf_counter() - begin
        if length != config.decode.max_length:
            raise RuntimeError(f"captions: found {length} tokens, expected {config.decode.max_length}")
        for number in range(1, args.warmup):
            captioner.caption(number, images)

    def repeat() -> Figures:
        found = {name: captioner.timed(images, args.steps) for name, images in settings.items()}
        return found.pop("batch") | found

    facts = {
        "method": config.decode.method,
        "batch": batch,
        "tokens_a_caption": config.decode.max_length,
        "compile_s": compile_s,
    }
    yield Benchmark("captions_s", facts, repeat)


class _EndlessCaptioner:
    """A random decoder that predicts <end> only as the last token, so that every run does equal work."""

    def __init__(self, config: Config, args: BenchArgs, batches: Iterable[int]):
        mesh = sharding.make_mesh()
        dtype = jnp.dtype(config.encoder.store_dtype)
        source = synthetic.SyntheticFeatures(args.images, args.positions, args.feature_dim, dtype, config.seed)
        sizes = decoder_lib.Sizes(args.positions, args.feature_dim, synthetic.vocabulary_size(config.data))
        bind, init = decoder_lib.create(config, sizes)
        params = jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(config.seed))
        endless = decoder_lib.with_output(bind, lambda weights: output_layer.exclude(weights, slice(END, END + 1)))
        # The synthetic vocabulary has no other list of words.
        options = dataclasses.replace(config.decode, bad_endings="english" if config.decode.bad_endings else "")
        self._decode = generate.Generator(endless, options, synthetic.vocabulary(config.data))
        self._frozen = self._decode.freeze(params)
        self._seed = config.seed
        # Features are on the device before the first repetition: `flaxcap bench input` measures their transfer.
        self._feats_IPF = {}
        for images in batches:
            placed = sharding.over_images(mesh) if images % mesh.size == 0 else sharding.replicated(mesh)
            self._feats_IPF[images] = jax.device_put(source.read(np.arange(images)), placed)

    def caption(self, number: int, images: int) -> np.ndarray:
        """Decodes and fetches the captions of `images` images, `tokens_IT`; `number` seeds sampling."""
        key = jax.random.fold_in(jax.random.key(self._seed), number)
        return jax.device_get(self._decode(self._frozen, self._feats_IPF[images], key).tokens_IT)

    def timed(self, images: int, calls: int) -> Figures:
        """Times `calls` batches of `images` images."""
        call_ms, tokens = [], 0
        begin = last = time.perf_counter()
        for number in range(calls):
            tokens += self.caption(number, images).size
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


def _shortest(tokens_IT: np.ndarray) -> int:
    """Returns the number of tokens of the shortest caption, with <end>."""
    ends_IT = tokens_IT == END
    return int(np.where(ends_IT.any(1), ends_IT.argmax(1) + 1, tokens_IT.shape[1]).min())
