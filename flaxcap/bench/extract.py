"""`flaxcap bench extract`: synthetic photographs through the path of `flaxcap prepare`, and through each half of it."""

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image

from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates
from flaxcap.config import Config
from flaxcap.encoders import base as encoders
from flaxcap.features import extract
from flaxcap.features.shards import Split
from flaxcap.images import decode
from flaxcap.runtime import progress

PHOTOGRAPHS = 256  # different files; later images repeat them, to save start-up time
WIDTH, HEIGHT, QUALITY = 640, 480, 90  # as COCO's
MEASURED_ON = 4  # photographs that random weights may be scaled by


def photograph(rng: np.random.Generator) -> bytes:
    """Returns a JPEG file of smooth random content: coarse shapes under finer and fainter ones."""
    pixels_YX3 = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, contrast in ((4, 40), (16, 20), (64, 16), (160, 12), (320, 10)):
        coarse = rng.standard_normal((cells * HEIGHT // WIDTH, cells, 3), np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels_YX3[..., channel] += contrast * np.asarray(layer)
    file = io.BytesIO()
    Image.fromarray(pixels_YX3.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times a store of `steps` batches being written, then the network alone and the JPEG decoding alone."""
    extraction = _Extraction(config, args)
    compile_s = extraction.warm_up()

    def repeat() -> Figures:
        found = extraction.complete() | {"network": extraction.network()}
        one = extraction.decoding(1)
        found["decoding"] = {"one_thread_images_s": one, "all_threads_images_s": extraction.decoding(args.workers)}
        return found | {"threads_that_keep_up": math.ceil(found["network"]["images_s"] / one)}

    yield Benchmark("images_s", extraction.facts() | {"compile_s": compile_s}, repeat)


class _Extraction:
    """JPEG files in memory, and a random encoder that is ready for them."""

    def __init__(self, config: Config, args: BenchArgs):
        self._config, self._args = config.encoder, args
        encoder = encoders.make(config.encoder)
        rng = np.random.default_rng(config.seed)
        numbers = progress.bar(range(min(args.images, PHOTOGRAPHS)), "photographs", "photographs")
        self._files = [photograph(rng) for _ in numbers]
        self._preprocess = encoder.preprocess
        self._batch, self._at_once = extract.batch_size(config.encoder), extract.batches_at_once()
        self._pixels_IYX3 = np.stack([self.load(row) for row in range(max(self._batch, MEASURED_ON))])
        params, _ = encoder.load("random", lambda: self._pixels_IYX3[:MEASURED_ON])
        self._encode = extract.make_encode(encoder, params, config.encoder, many=True)

    def load(self, row: int) -> np.ndarray:
        """Decodes the file of a row into the encoder's pixels."""
        return decode.for_encoder(self._files[row % len(self._files)], self._preprocess)

    def warm_up(self) -> float:
        """Encodes a batch `warmup` times. Returns the seconds of the compilation before."""
        begin = time.perf_counter()
        np.asarray(self._encode(self._pixels_IYX3[: self._batch]))
        compile_s = time.perf_counter() - begin
        for _ in range(self._args.warmup):
            np.asarray(self._encode(self._pixels_IYX3[: self._batch]))
        return compile_s

    def complete(self) -> Figures:
        """Times `flaxcap prepare`'s extraction into a new store."""
        count = self._args.steps * self._batch
        with tempfile.TemporaryDirectory(prefix="flaxcap-bench-") as folder:
            split = Split(epath.Path(folder), count, self._config.shard_images)
            begin = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # `extract` prints a rate of its own
                extract.extract(
                    split,
                    split.create_array(self._args.positions, self._args.feature_dim, self._config.store_dtype),
                    self.load,
                    self._encode,
                    batch_size=self._batch,
                    at_once=self._at_once,
                    num_workers=self._args.workers,
                    max_bad_fraction=0,
                    name="extract",
                )
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "images": count, **rates(seconds, images=count)}

    def network(self) -> Figures:
        """Times the encoder on pixels in memory."""
        count = self._args.steps * self._batch
        items = ((n, self._pixels_IYX3[n % self._batch]) for n in range(count))
        begin = time.perf_counter()
        for _ in extract.encode_ahead(items, self._encode, self._batch, self._at_once):
            pass
        return rates(time.perf_counter() - begin, images=count)

    def decoding(self, threads: int) -> float:
        """Returns the images a second that threads decode."""
        count = threads * min(len(self._files), 64)
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            for _ in pool.map(self.load, range(count)):
                pass
            return count / (time.perf_counter() - begin)

    def facts(self) -> Figures:
        return {
            "batch": self._batch,
            "batches_at_once": self._at_once,
            "workers": self._args.workers,
            "pictures": len(self._files),
            "picture_kb": sum(map(len, self._files)) / len(self._files) / 1e3,
        }
