"""CIDEr: n-grams that many people used for the image, and few for other images, count most.

Vedantam et al. 2015 (arxiv.org/abs/1411.5726). A caption's vector holds its n-gram counts, each weighted by
log(images / images with the n-gram in a reference). An n-gram that no reference has counts as one image's. The original
formula is the mean cosine of the candidate's vector with those of the image's references, over n = 1 to 4.

CIDEr-D changes three things: a candidate's counts are clipped to the reference's, a Gaussian of the difference in
length lowers the cosine, and the result is multiplied by ten. Neither formula stems words here.

"Images" are those that are scored: with a subset of a split, the subset's. pycocoevalcap's mode "corpus" does the same.
"""

import numpy as np

from flaxcap.metrics.ngrams import ORDERS, Matches, References

SIGMA = 6.0  # of the Gaussian, in words


class Cider:
    """CIDEr with the document frequencies of `references`.

    Attributes:
      informative: True if some n-gram tells images apart. With one image none does, and CIDEr is 0.
    """

    def __init__(self, references: References):
        self._log_images = np.log(len(references.num_references))
        weights = references.entry_count * self._idf(references.entry_images)
        self._reference_norms = _norms(
            references.entry_reference, references.entry_order, weights, len(references.lengths)
        )
        self._reference_lengths = references.lengths
        # False: every n-gram has a weight of 0, and so has every caption.
        self.informative = bool((references.entry_images < len(references.num_references)).any())

    def cider_d(self, matches: Matches) -> np.ndarray:
        """Returns the CIDEr-D of each candidate, float64 from 0 to 10; pycocoevalcap calls it CIDEr."""
        clipped = np.minimum(matches.entry_count[matches.hit_entry], matches.hit_count)
        # pycocoevalcap measures a caption's length in pairs of words.
        lengths, reference_lengths = (np.maximum(n - 1, 0) for n in (matches.lengths, self._reference_lengths))
        difference = lengths[matches.pair_candidate] - reference_lengths[matches.pair_reference]
        similarity = self._cosine(matches, clipped) * np.exp(-(difference**2) / (2 * SIGMA**2))
        return 10 * _mean_over_references(matches, similarity)

    def original(self, matches: Matches) -> np.ndarray:
        """Returns the CIDEr of each candidate by the original formula, float64 from 0 to 1."""
        return _mean_over_references(matches, self._cosine(matches, matches.entry_count[matches.hit_entry]))

    def _idf(self, images: np.ndarray) -> np.ndarray:
        return self._log_images - np.log(np.maximum(images, 1))

    def _cosine(self, matches: Matches, hit_candidate_count: np.ndarray) -> np.ndarray:
        """Returns the mean over the orders of each pair's cosine.

        Args:
          matches: the candidates' n-grams.
          hit_candidate_count: [hits], the count in the candidate, clipped or not.
        """
        idf = self._idf(matches.entry_images)
        norms = _norms(matches.entry_candidate, matches.entry_order, matches.entry_count * idf, len(matches.lengths))
        pair_norms = norms[matches.pair_candidate] * self._reference_norms[matches.pair_reference]
        product = idf[matches.hit_entry] ** 2 * hit_candidate_count * matches.hit_count
        cell = matches.hit_pair * ORDERS + matches.entry_order[matches.hit_entry]
        dot = np.bincount(cell, product, pair_norms.size).reshape(-1, ORDERS)
        return np.divide(dot, pair_norms, out=np.zeros_like(pair_norms), where=pair_norms > 0).mean(1)


def _norms(caption: np.ndarray, order: np.ndarray, weights: np.ndarray, num_captions: int) -> np.ndarray:
    """Returns the norms of the captions' vectors, float64 [captions, 4]."""
    return np.sqrt(np.bincount(caption * ORDERS + order, weights**2, num_captions * ORDERS)).reshape(-1, ORDERS)


def _mean_over_references(matches: Matches, pair_value: np.ndarray) -> np.ndarray:
    return np.bincount(matches.pair_candidate, pair_value, len(matches.lengths)) / matches.num_references
