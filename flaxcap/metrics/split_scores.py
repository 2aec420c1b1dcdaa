"""All scores of a split's captions: the numbers in `scores.json`."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from flaxcap.features.shards import Row
from flaxcap.metrics import diagnostics, meteor_spice
from flaxcap.metrics.scorer import Scorer

IsTrue = Callable[[int, str], bool]


def score_split(
    rows: Sequence[Row], texts: Sequence[str], vocabulary: Collection[str], is_true: IsTrue | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores one caption for each image of a split.

        Bleu_1 … CIDEr_original   see `metrics.scorer`
        METEOR, SPICE             if Java is installed, see `metrics.meteor_spice`
        CIDEr_swapped             CIDEr of the captions of other images: the score of captions that ignore the image
        true                      share of captions that are true of their image, if `is_true` is given
        true_swapped              share of captions that are true of another image, if `is_true` is given
        health/…                  see `metrics.diagnostics.health`

    Args:
      rows: the images with their references.
      texts: one caption for each image.
      vocabulary: the words that the model can write.
      is_true: tells from an image id and a caption whether the caption is true of the image.

    Returns:
      The scores by name, and for each of METEOR and SPICE that is missing the reason.
    """
    references = [row.captions for row in rows]
    scorer = Scorer(references)
    scores = scorer.score(texts)
    java_scores, missing = meteor_spice.score(texts, references)
    # Half a split away: no image keeps its own caption, and the result needs no seed.
    half = len(texts) // 2
    swapped = [*texts[half:], *texts[:half]]
    scores |= java_scores | {"CIDEr_swapped": float(scorer.cider(swapped).mean())}
    if is_true is not None:
        for name, some in (("true", texts), ("true_swapped", swapped)):
            scores[name] = float(np.mean([is_true(row.image_id, text) for row, text in zip(rows, some, strict=True)]))
    report = diagnostics.health(texts, references, vocabulary)
    return scores | {f"health/{name}": value for name, value in report.items()}, missing
