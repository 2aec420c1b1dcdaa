"""All scores of a split's captions: the numbers in `scores.json`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flaxcap.features.shards import Row
from flaxcap.metrics import diagnostics, meteor_spice
from flaxcap.metrics.scorer import Scorer
from flaxcap.text.vocabulary import Vocabulary

IsTrue = Callable[[int, str], bool]


class SplitScores(NamedTuple):
    """The scores of a split's captions."""

    values: dict[str, float]
    missing: dict[str, str]  # for METEOR and SPICE, the reason why there is none
    unit: str  # what scores and lengths count: "words", or "characters" in languages without spaces between words


def score_split(
    rows: Sequence[Row], texts: Sequence[str], vocabulary: Vocabulary, is_true: IsTrue | None = None
) -> SplitScores:
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
      vocabulary: of the model.
      is_true: tells from an image id and a caption whether the caption is true of the image.
    """
    references = [row.captions for row in rows]
    scorer = Scorer(references)
    scores = scorer.score(texts)
    java_scores, missing = meteor_spice.score(texts, references, scorer.unit)
    # Half a split away: no image keeps its own caption, and the result needs no seed.
    half = len(texts) // 2
    swapped = [*texts[half:], *texts[:half]]
    scores |= java_scores | {"CIDEr_swapped": float(scorer.cider(swapped).mean())}
    if is_true is not None:
        for name, some in (("true", texts), ("true_swapped", swapped)):
            scores[name] = float(np.mean([is_true(row.image_id, text) for row, text in zip(rows, some, strict=True)]))
    report = diagnostics.health(texts, references, vocabulary, scorer.unit)
    scores |= {f"health/{name}": value for name, value in report.items()}
    return SplitScores(scores, missing, scorer.unit.name)
