"""`flaxcap bench score`: BLEU, ROUGE-L and CIDEr of synthetic captions, with five references each."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from flaxcap.bench import synthetic
from flaxcap.bench.base import BenchArgs, Benchmark, Figures, rates
from flaxcap.config import Config, Data
from flaxcap.metrics import scorer
from flaxcap.text.vocabulary import END


@contextlib.contextmanager
def benchmark(config: Config, args: BenchArgs) -> Iterator[Benchmark]:
    """Times scoring one caption for each image, with the preparation of the references. `steps` has no effect."""
    references = _captions(args.images, config.data, config.seed)
    candidates = [first for first, *_ in _captions(args.images, config.data, config.seed + 1)]

    def repeat() -> Figures:
        begin = time.perf_counter()
        scorer.score(candidates, references)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "captions": len(candidates), **rates(seconds, captions=len(candidates))}

    yield Benchmark("captions_s", {"references": synthetic.CAPTIONS * args.images}, repeat)


def _captions(images: int, data: Data, seed: int) -> list[list[str]]:
    """Returns the synthetic captions of each image as text; each token id becomes a word of letters."""
    tokens = synthetic.captions(images, data, seed)
    letters = str.maketrans("0123456789", "abcdefghij")
    texts = [
        " ".join(str(token).translate(letters) for token in ids if token > END)
        for ids in np.split(tokens.ids, tokens.starts[1:-1])
    ]
    return [texts[n : n + synthetic.CAPTIONS] for n in range(0, len(texts), synthetic.CAPTIONS)]
