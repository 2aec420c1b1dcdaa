"""Caption metrics without Java, equal to pycocoevalcap's, under the names of the COCO caption evaluation.

    scorer = Scorer(references)           # for each image its captions; made once
    scorer.score(candidates)              # {"Bleu_1": …, …}
    scorer.cider(candidates).mean()       # CIDEr alone, in milliseconds

| name           | range   | metric                                                                               |
|----------------|---------|--------------------------------------------------------------------------------------|
| Bleu_1 … 4     | 0 to 1  | BLEU                                                                                 |
| ROUGE_L        | 0 to 1  | ROUGE-L                                                                              |
| CIDEr          | 0 to 10 | CIDEr-D: pycocoevalcap's CIDEr, and the one that papers report                       |
| CIDEr_original | 0 to 1  | CIDEr by its original formula, without the changes of CIDEr-D; see `metrics.cider`   |

In languages without spaces between words, characters take the place of words, see `metrics.units`.
"""

from collections.abc import Sequence

import numpy as np

from flaxcap.errors import UserError
from flaxcap.metrics.bleu import bleu
from flaxcap.metrics.cider import Cider
from flaxcap.metrics.ngrams import ORDERS, References
from flaxcap.metrics.rouge import rouge_l
from flaxcap.metrics.units import unit_of

BLEU = tuple(f"Bleu_{n}" for n in range(1, ORDERS + 1))


class Scorer:
    """Scores captions against the references of their images. `unit`: what counts as a token."""

    def __init__(self, references: Sequence[Sequence[str]]):
        """Tokenises and counts the references.

        Args:
          references: for each image, its captions, untokenised.

        Raises:
          UserError: there are no images, or an image has no reference.
        """
        self.unit = unit_of(references)
        self._references = [[self.unit.tokenize(caption) for caption in some] for some in references]
        self._ngrams = References(self._references)
        self._cider = Cider(self._ngrams)

    def score(self, candidates: Sequence[str]) -> dict[str, float]:
        """Returns the scores of the corpus by name.

        Args:
          candidates: one caption for each image, in the order of the references.

        Raises:
          UserError: the numbers of captions and images differ.
        """
        return self.score_each(candidates)[0]

    def score_each(self, candidates: Sequence[str]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Returns the scores of the corpus and those of each image, float64 [images], both by name.

        The corpus's score is the mean of the images' scores. BLEU is the exception: it adds the counts of all images
        first.
        """
        words = [self.unit.tokenize(caption) for caption in candidates]
        matches = self._ngrams.match(words, self._checked(candidates, None))
        bleu_corpus, bleu_each = bleu(matches, self._ngrams)
        each = {
            "ROUGE_L": np.array([rouge_l(*pair) for pair in zip(words, self._references, strict=True)]),
            "CIDEr": self._cider.cider_d(matches),
            "CIDEr_original": self._cider.original(matches),
        }
        corpus = dict(zip(BLEU, bleu_corpus.tolist(), strict=True)) | {
            name: float(some.mean()) for name, some in each.items()
        }
        return corpus, dict(zip(BLEU, bleu_each.T, strict=True)) | each

    def cider(self, candidates: Sequence[str], images: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Returns the CIDEr-D of each candidate, float64 [candidates].

        Args:
          candidates: captions. An image may have none or many.
          images: the index of each candidate's image among the references; None: one candidate for each image, in
            their order.

        Raises:
          UserError: the numbers of candidates and images differ, or an index is out of range.
        """
        images = self._checked(candidates, images)
        words = [self.unit.tokenize(caption) for caption in candidates]
        return self._cider.cider_d(self._ngrams.match(words, images))

    def _checked(self, candidates: Sequence[str], images: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """Returns the index of each candidate's image, int64 [candidates]; UserError for bad ones."""
        known = len(self._references)
        images = np.arange(known) if images is None else np.asarray(images, np.int64)
        if len(images) != len(candidates):
            raise UserError(f"captions: found {len(candidates)}, expected one for each of {len(images)} images")
        if not ((images >= 0) & (images < known)).all():
            raise UserError(f"images: found indices {images.min()} to {images.max()}, expected 0 to {known - 1}")
        return images


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the corpus's scores of one caption for each image, see `Scorer.score`."""
    return Scorer(references).score(candidates)
