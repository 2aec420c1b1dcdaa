"""`flaxcap bench extract`: made-up photographs through the path of `flaxcap prepare`, and through each half of it."""

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tqdm
from etils import epath
from PIL import Image

from flaxcap.bench.base import Figures, Given, Work, rates
from flaxcap.config import Config
from flaxcap.encoders import base as encoders
from flaxcap.features import extract
from flaxcap.features.shards import Split
from flaxcap.images import decode

PICTURES = 256  # different ones; more would only take time to be made
WIDTH, HEIGHT, QUALITY = 640, 480, 90  # as COCO's
MEASURED_ON = 4  # pictures that the random network's batch norm is measured on


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG of smooth random content, coarse shapes with ever finer and fainter ones on them."""
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
def work(config: Config, given: Given) -> Iterator[Work]:
    """A repetition writes a store of `steps` batches of features, then times the network and the decoding alone."""
    encoder = encoders.make(config.encoder)
    rng = np.random.default_rng(config.seed)
    numbers = tqdm.trange(min(given.images, PICTURES), desc="pictures", disable=None)
    files = [picture(rng) for _ in numbers]

    def load(row: int) -> np.ndarray:
        return decode.for_encoder(files[row % len(files)], encoder.preprocess)

    batch, at_once = extract.batch_size(config.encoder), extract.batches_at_once()
    pixels_IYX3 = np.stack([load(row) for row in range(max(batch, MEASURED_ON))])
    sample = pixels_IYX3[:MEASURED_ON]
    params, _ = encoder.load("random", lambda: sample)
    encode = extract.make_encode(encoder, params, config.encoder, many=True)
    begin = time.perf_counter()
    np.asarray(encode(pixels_IYX3[:batch]))
    compile_s = time.perf_counter() - begin
    for _ in range(given.warmup):
        np.asarray(encode(pixels_IYX3[:batch]))

    def whole() -> Figures:
        count = given.steps * batch
        with tempfile.TemporaryDirectory(prefix="flaxcap-bench-") as folder:
            split = Split(epath.Path(folder), count, config.encoder.shard_images)
            begin = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # it says its rate, and so do we
                extract.extract(
                    split,
                    split.create_array(given.positions, given.feature_dim, config.encoder.store_dtype),
                    load,
                    encode,
                    batch_size=batch,
                    at_once=at_once,
                    num_workers=given.workers,
                    max_bad_fraction=0,
                    name="extract",
                )
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "images": count, **rates(seconds, images=count)}

    def network() -> Figures:
        items = ((n, pixels_IYX3[n % batch]) for n in range(given.steps * batch))
        begin = time.perf_counter()
        for _ in extract.encode_ahead(items, encode, batch, at_once):
            pass
        return rates(time.perf_counter() - begin, images=given.steps * batch)

    def decoding(threads: int) -> float:
        """Pictures a second."""
        count = threads * min(len(files), 64)
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            for _ in pool.map(load, range(count)):
                pass
            return count / (time.perf_counter() - begin)

    def repeat() -> Figures:
        found = whole() | {"network": network()}
        one = decoding(1)
        found["decoding"] = {"one_thread_images_s": one, "all_threads_images_s": decoding(given.workers)}
        return found | {"threads_that_keep_up": math.ceil(found["network"]["images_s"] / one)}

    facts = {
        "batch": batch,
        "batches_at_once": at_once,
        "workers": given.workers,
        "pictures": len(files),
        "picture_kb": sum(map(len, files)) / len(files) / 1e3,
        "compile_s": compile_s,
    }
    yield Work("images_s", facts, repeat)
