"""Caption metrics without Java, under the names of the COCO caption evaluation and equal to pycocoevalcap's.

scorer = Scorer(references)           # for each image its captions; made once
scorer.score(candidates)              # {"Bleu_1": …, …}
scorer.cider(candidates).mean()       # CIDEr alone, in milliseconds
"""

from collections.abc import Sequence

import numpy as np

from flaxcap.errors import UserError
from flaxcap.metrics.bleu import bleu
from flaxcap.metrics.cider import Cider
from flaxcap.metrics.ngrams import ORDERS, References
from flaxcap.metrics.ptb import tokenize
from flaxcap.metrics.rouge import rouge_l

BLEU = tuple(f"Bleu_{n}" for n in range(1, ORDERS + 1))


class Scorer:
    """Scores captions against the references of their images."""

    def __init__(self, references: Sequence[Sequence[str]]):
        """`references`: for each image, its captions, as people wrote them. UserError if an image has none."""
        self._references = [[tokenize(caption) for caption in some] for some in references]
        self._ngrams = References(self._references)
        self._cider = Cider(self._ngrams)

    def score(self, candidates: Sequence[str]) -> dict[str, float]:
        """The scores of the whole corpus; `candidates`: one caption for each image, in the references' order.

        Bleu_1 … Bleu_4, ROUGE_L, CIDEr (what pycocoevalcap prints under that name, the formula called CIDEr-D) and
        CIDEr_plain (the paper's first formula). UserError if the numbers of captions and images differ.
        """
        return self.score_each(candidates)[0]

    def score_each(self, candidates: Sequence[str]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The scores of the corpus and, under the same names, of each image, float64 [images].

        The corpus's is the mean of the images', but not for BLEU, which adds the counts of all images first.
        """
        words = [tokenize(caption) for caption in candidates]
        matches = self._ngrams.match(words, self._images(candidates, None))
        bleu_N, bleu_IN = bleu(matches, self._ngrams)
        each = {
            "ROUGE_L": np.array([rouge_l(*pair) for pair in zip(words, self._references, strict=True)]),
            "CIDEr": self._cider.cider_d(matches),
            "CIDEr_plain": self._cider.cider(matches),
        }
        corpus = dict(zip(BLEU, bleu_N.tolist(), strict=True)) | {
            name: float(some.mean()) for name, some in each.items()
        }
        return corpus, dict(zip(BLEU, bleu_IN.T, strict=True)) | each

    def cider(self, candidates: Sequence[str], images: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """CIDEr-D of each candidate, float64 [candidates]; its mean is the corpus's CIDEr.

        `images`: the place of each candidate's image among the references; an image may have none or many candidates.
        Without it, one for each image, in their order.
        """
        image_C = self._images(candidates, images)
        return self._cider.cider_d(self._ngrams.match([tokenize(caption) for caption in candidates], image_C))

    def _images(self, candidates: Sequence[str], images: Sequence[int] | np.ndarray | None) -> np.ndarray:
        known = len(self._references)
        image_C = np.arange(known) if images is None else np.asarray(images, np.int64)
        if len(image_C) != len(candidates):
            raise UserError(f"expected a caption for each of {len(image_C)} images, found {len(candidates)} captions")
        if not ((image_C >= 0) & (image_C < known)).all():
            raise UserError(
                f"there are references of {known} images, found places from {image_C.min()} to {image_C.max()}"
            )
        return image_C


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The corpus scores of one caption for each image, see `Scorer.score`."""
    return Scorer(references).score(candidates)
