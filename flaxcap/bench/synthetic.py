"""A synthetic data set of any size, drawn from a seed: captions with COCO's lengths, and features."""

from collections.abc import Sequence

import numpy as np

from flaxcap import config as config_lib
from flaxcap.input_pipeline.batching import Batch, Plan
from flaxcap.text import function_words
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import END, SPECIAL, START, Vocabulary

CAPTIONS = 5  # an image
SHORTEST, MEAN, DEVIATION = 8, 12.5, 2.4  # tokens of a caption, with <start> and <end>
BLOCK = 256  # images with different features; later images repeat them, to save host memory and time


def vocabulary_size(data: config_lib.Data) -> int:
    """Returns the number of token ids. The first four are no words."""
    return max(data.vocab_size + 1, END + 2)


def vocabulary(data: config_lib.Data) -> Vocabulary:
    """Returns a vocabulary of English function words, at most half of the words, and of numbers."""
    size = vocabulary_size(data) - len(SPECIAL)
    return Vocabulary([*SPECIAL, *[*sorted(function_words.ENGLISH)[: size // 2], *map(str, range(size))][:size]])


def captions(images: int, data: config_lib.Data, seed: int = 0) -> Tokens:
    """Draws five captions for each image.

    Lengths are 8 + gamma, rounded down and cut at `data.max_length`. Words follow Zipf's law.

    Args:
      images: number of images.
      data: its `vocab_size` and `max_length` apply.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    more = MEAN - SHORTEST + 0.5  # rounding down takes away half a token on average
    gamma = rng.gamma((more / DEVIATION) ** 2, DEVIATION**2 / more, images * CAPTIONS)
    lengths = np.minimum((SHORTEST + gamma).astype(np.int64), data.max_length)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    words = np.arange(END + 1, vocabulary_size(data))
    ids = rng.choice(words, size=starts[-1], p=(1 / words) / (1 / words).sum()).astype(np.int32)
    ids[starts[:-1]] = START
    ids[starts[1:] - 1] = END
    return Tokens(ids, starts, np.repeat(np.arange(images, dtype=np.int32), CAPTIONS))


def texts(images: int, data: config_lib.Data, seed: int) -> list[list[str]]:
    """Returns the captions of each image as text, in the words of `vocabulary`."""
    tokens, words = captions(images, data, seed), vocabulary(data).tokens
    found = [" ".join(words[n] for n in ids if n > END) for ids in np.split(tokens.ids, tokens.starts[1:-1])]
    return [found[n : n + CAPTIONS] for n in range(0, len(found), CAPTIONS)]


class SyntheticFeatures:
    """Features `|normal|`, which resemble those after a relu; a source for the device feed."""

    def __init__(self, images: int, positions: int, feature_dim: int, dtype: np.dtype, seed: int = 0):
        """Draws the features of at most `BLOCK` images.

        Args:
          images: number of images.
          positions: P.
          feature_dim: F.
          dtype: of the features.
          seed: of the random numbers.
        """
        rng = np.random.default_rng(seed)
        feats_NPF = rng.standard_normal((min(images, BLOCK), positions, feature_dim), np.float32)
        self.block_NPF = np.abs(feats_NPF, out=feats_NPF).astype(dtype)
        self.shape = (images, positions, feature_dim)
        self.dtype = self.block_NPF.dtype

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the features of some rows, `[len(rows), P, F]`."""
        return self.block_NPF[np.asarray(rows) % len(self.block_NPF)]


def plan(images: int, config: config_lib.Config) -> Plan:
    """Returns the trainer's plan for the synthetic captions."""
    return Plan(
        captions(images, config.data, config.seed),
        batch_images=config.train.batch_images,
        captions_per_image=config.train.captions_per_image,
        num_buckets=config.train.num_buckets,
        batches_per_dispatch=config.train.steps_per_dispatch,
        seed=config.seed,
    )


def sample(plan: Plan, steps: int) -> list[list[Batch]]:
    """Chooses dispatches, of `steps` steps together, that represent complete epochs.

    Consecutive steps of an epoch share a length, so the first few steps are no fair sample. The dispatches of one
    epoch, or of as many as needed, are ordered by length and taken at even distances.
    """
    epochs = -(-steps // plan.steps_per_epoch)
    dispatches = list(plan.dispatches(0, epochs * plan.steps_per_epoch))
    order = sorted(range(len(dispatches)), key=lambda n: dispatches[n][0].tokens_ICT.shape[-1])
    ends = np.cumsum([len(dispatches[n]) for n in order])
    chosen: list[list[Batch]] = []
    for count in range(1, len(order) + 1):
        middles = (np.arange(count) + 0.5) / count * ends[-1]
        picked = sorted({order[i] for i in np.searchsorted(ends, middles, "right")})
        chosen = [list(dispatches[n]) for n in picked]
        if sum(map(len, chosen)) >= steps:
            break
    else:
        chosen = dispatches
    while sum(map(len, chosen)) > steps:
        max(reversed(chosen), key=len).pop()
    return [batches for batches in chosen if batches]


def counts(dispatches: list[list[Batch]]) -> dict[str, int]:
    """Counts steps, images, captions and predicted tokens, without and with padding, over all batches."""
    batches = [batch for dispatch in dispatches for batch in dispatch]
    return {
        "steps": len(batches),
        "images": sum(int((b.rows_I >= 0).sum()) for b in batches),
        "captions": sum(int((b.tokens_ICT[..., 0] == START).sum()) for b in batches),
        "tokens": sum(int((b.tokens_ICT[..., 1:] > 0).sum()) for b in batches),
        "padded_tokens": sum(b.tokens_ICT[..., 1:].size for b in batches),
    }
