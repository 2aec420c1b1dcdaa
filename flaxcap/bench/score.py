"""`flaxcap bench score`: BLEU, ROUGE-L and CIDEr of synthetic captions, with five references each."""

import contextlib
import time
from collections.abc import Iterator

from flaxcap.bench import synthetic
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates
from flaxcap.config import Config
from flaxcap.metrics import scorer


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times scoring one caption for each image, with the preparation of the references. `steps` has no effect."""
    references = synthetic.texts(args.images, config.data, config.seed)
    candidates = [first for first, *_ in synthetic.texts(args.images, config.data, config.seed + 1)]

    def repeat() -> Figures:
        begin = time.perf_counter()
        scorer.score(candidates, references)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "captions": len(candidates), **rates(seconds, captions=len(candidates))}

    yield Benchmark("captions_s", {"references": synthetic.CAPTIONS * args.images}, repeat)
