"""Made-up captions and features: a corpus of COCO's lengths, of any size, from a seed."""

from collections.abc import Sequence

import numpy as np

from flaxcap import config as config_lib
from flaxcap.input_pipeline.batching import Batch, Plan
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import END, START

CAPTIONS = 5  # an image
SHORTEST, MEAN, DEVIATION = 8, 12.5, 2.4  # tokens of a caption, <start> and <end> included
BLOCK = 256  # images whose features differ; more would only fill the host's memory


def vocabulary_size(data: config_lib.Data) -> int:
    """Token ids of the made-up captions, of which the first four are no words."""
    return max(data.vocab_size + 1, END + 2)


def captions(images: int, data: config_lib.Data, seed: int = 0) -> Tokens:
    """Five captions for each image.

    Lengths are 8 + gamma, in whole tokens, cut at `max_length`; words fall by Zipf's law with their id.
    """
    rng = np.random.default_rng(seed)
    more = MEAN - SHORTEST + 0.5  # the half that whole tokens take away
    gamma = rng.gamma((more / DEVIATION) ** 2, DEVIATION**2 / more, images * CAPTIONS)
    lengths = np.minimum((SHORTEST + gamma).astype(np.int64), data.max_length)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    words = np.arange(END + 1, vocabulary_size(data))
    ids = rng.choice(words, size=starts[-1], p=(1 / words) / (1 / words).sum()).astype(np.int32)
    ids[starts[:-1]] = START
    ids[starts[1:] - 1] = END
    return Tokens(ids, starts, np.repeat(np.arange(images, dtype=np.int32), CAPTIONS))


class MadeUp:
    """Features of as many images as are asked for, `|normal|` as the last block's; a `feed.Source`."""

    def __init__(self, images: int, positions: int, feature_dim: int, dtype: np.dtype, seed: int = 0):
        rng = np.random.default_rng(seed)
        feats_NPF = rng.standard_normal((min(images, BLOCK), positions, feature_dim), np.float32)
        self._block_NPF = np.abs(feats_NPF, out=feats_NPF).astype(dtype)
        self.shape = (images, positions, feature_dim)
        self.dtype = self._block_NPF.dtype

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """`[len(rows), P, F]`; images repeat after `BLOCK`."""
        return self._block_NPF[np.asarray(rows) % len(self._block_NPF)]


def plan(images: int, config: config_lib.Config) -> Plan:
    """The trainer's plan of the made-up captions."""
    return Plan(
        captions(images, config.data, config.seed),
        batch_images=config.train.batch_images,
        captions_per_image=config.train.captions_per_image,
        num_buckets=config.train.num_buckets,
        batches_per_dispatch=config.train.steps_per_dispatch,
        seed=config.seed,
    )


def sample(plan: Plan, steps: int) -> list[list[Batch]]:
    """Dispatches of `steps` steps in all that stand for whole epochs.

    Neighbouring steps of an epoch share a length, so a few of them are no sample of it. These are taken evenly from
    an epoch, or as many as are needed, ordered by length.
    """
    epochs = -(-steps // plan.steps_per_epoch)
    dispatches = list(plan.dispatches(0, epochs * plan.steps_per_epoch))
    order = sorted(range(len(dispatches)), key=lambda n: dispatches[n][0].tokens_ICT.shape[-1])
    ends = np.cumsum([len(dispatches[n]) for n in order])
    chosen: list[list[Batch]] = []
    for count in range(1, len(order) + 1):
        places = (np.arange(count) + 0.5) / count * ends[-1]
        picked = sorted({order[i] for i in np.searchsorted(ends, places, "right")})
        chosen = [list(dispatches[n]) for n in picked]
        if sum(map(len, chosen)) >= steps:
            break
    else:
        chosen = dispatches
    while sum(map(len, chosen)) > steps:
        max(reversed(chosen), key=len).pop()
    return [batches for batches in chosen if batches]


def counts(dispatches: list[list[Batch]]) -> dict[str, int]:
    """Of all their batches: steps, images, captions, the tokens that are predicted, and places for such tokens."""
    batches = [batch for dispatch in dispatches for batch in dispatch]
    return {
        "steps": len(batches),
        "images": sum(int((b.rows_I >= 0).sum()) for b in batches),
        "captions": sum(int((b.tokens_ICT[..., 0] == START).sum()) for b in batches),
        "tokens": sum(int((b.tokens_ICT[..., 1:] > 0).sum()) for b in batches),
        "places": sum(b.tokens_ICT[..., 1:].size for b in batches),
    }
