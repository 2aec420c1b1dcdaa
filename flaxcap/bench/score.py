"""`flaxcap bench score`: the scores that need no Java, of made-up captions against five references each."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from flaxcap.bench import synthetic
from flaxcap.bench.base import Figures, Given, Work, rates
from flaxcap.config import Config, Data
from flaxcap.metrics import scorer
from flaxcap.text.vocabulary import END


@contextlib.contextmanager
def work(config: Config, given: Given) -> Iterator[Work]:
    """A repetition reads the references and scores a caption for each of `images` images, however many `steps`."""
    references = _captions(given.images, config.data, config.seed)
    candidates = [first for first, *_ in _captions(given.images, config.data, config.seed + 1)]

    def repeat() -> Figures:
        begin = time.perf_counter()
        scorer.score(candidates, references)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "captions": len(candidates), **rates(seconds, captions=len(candidates))}

    yield Work("captions_s", {"references": synthetic.CAPTIONS * given.images}, repeat)


def _captions(images: int, data: Data, seed: int) -> list[list[str]]:
    """The corpus's captions of each image, each id a word of letters."""
    tokens = synthetic.captions(images, data, seed)
    letters = str.maketrans("0123456789", "abcdefghij")
    texts = [
        " ".join(str(token).translate(letters) for token in ids if token > END)
        for ids in np.split(tokens.ids, tokens.starts[1:-1])
    ]
    return [texts[n : n + synthetic.CAPTIONS] for n in range(0, len(texts), synthetic.CAPTIONS)]
