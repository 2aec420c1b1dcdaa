"""The work of every script here: made-up captions and features with COCO's sizes, drawn from a seed.

`flaxcap bench` draws captions from the same distributions. Token ids: 0 <pad>, 1 <unk>, 2 <start>, 3 <end>, then words.
"""

import numpy as np

VOCABULARY, EMBEDDING, UNITS = 5001, 256, 512
POSITIONS, FEATURES = 64, 2048
BATCH = 64
START, END = 2, 3
IMAGES, CAPTIONS_AN_IMAGE = 2000, 5
LONGEST = 50  # tokens; the tutorial pads every caption to the longest one
KEPT = 24  # batches whose features stay in memory, 34 MB each; later steps use them again


def captions(longest: int = LONGEST, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws five captions for each of 2,000 images.

    Lengths are 8 + gamma (mean 12.5, standard deviation 2.4), with <start> and <end>. Words follow Zipf's law.

    Args:
        longest: tokens at which a caption is cut, and the width of the array.
        seed: of the random numbers.

    Returns:
        Token ids, int32 `[10000, longest]`, and lengths, int64 `[10000]`. Captions 5i to 5i+4 belong to image i.
    """
    rng = np.random.default_rng(seed)
    count, mean, deviation = IMAGES * CAPTIONS_AN_IMAGE, 5.0, 2.4
    lengths = np.floor(8 + rng.gamma((mean / deviation) ** 2, deviation**2 / mean, count)).astype(np.int64)
    lengths = np.minimum(lengths, longest)
    words = np.arange(END + 1, VOCABULARY)
    probabilities = 1.0 / words
    drawn = rng.choice(words, size=(count, longest), p=probabilities / probabilities.sum()).astype(np.int32)
    tokens = np.where(np.arange(longest)[None] < lengths[:, None], drawn, 0).astype(np.int32)
    tokens[:, 0] = START
    tokens[np.arange(count), lengths - 1] = END
    return tokens, lengths


def batches(
    pad: str, count: int, size: int = BATCH, longest_first: bool = False, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Shuffles the captions and cuts them into batches.

    Args:
        pad: "batch" pads to the longest caption of a batch; a number pads to that many tokens. At "20", 0.6% of the
            captions are cut.
        count: batches to return.
        size: captions in a batch.
        longest_first: sorts each batch by decreasing length.
        seed: of the captions; the shuffle uses the next one.

    Returns:
        For each batch token ids `[size, T]`, lengths `[size]` and image numbers `[size]`.
    """
    width = LONGEST if pad == "batch" else int(pad)
    tokens, lengths = captions(width, seed)
    order = np.random.default_rng(seed + 1).permutation(len(tokens))
    found = []
    for number in range(count):
        chosen = np.take(order, np.arange(number * size, (number + 1) * size), mode="wrap")
        if longest_first:
            chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
        steps = int(lengths[chosen].max()) if pad == "batch" else width
        batch = np.ascontiguousarray(tokens[chosen, :steps])
        found.append((batch, lengths[chosen], chosen // CAPTIONS_AN_IMAGE))
    return found


def random_features(images: int = IMAGES, seed: int = 0) -> np.ndarray:
    """Returns `|normal|` features, float32 `[images, 64, 2048]`."""
    feats = np.random.default_rng(seed).standard_normal((images, POSITIONS, FEATURES), dtype=np.float32)
    return np.abs(feats, out=feats)
