"""CIDEr: how well a caption's n-grams match those that many people used for its image and few for others.

Vedantam et al. 2015 (arxiv.org/abs/1411.5726): the mean, over an image's references and over n = 1 … 4, of the cosine
between the vectors of n-gram counts, each weighted by log(images / images whose references have the n-gram). An n-gram
that no image has counts as of one image. CIDEr-D clips a candidate's counts to the reference's, lowers the cosine by a
Gaussian of the difference in length and multiplies by ten. Words are not stemmed.
"""

import numpy as np

from flaxcap.metrics.ngrams import ORDERS, Matches, References

SIGMA = 6.0


class Cider:
    """CIDEr with the document frequencies of `references`."""

    def __init__(self, references: References):
        self._log_images = np.log(len(references.count_I))
        weight_K = references.count_K * self._idf(references.images_K)
        self._norm_RN = _norms(references.reference_K, references.order_K, weight_K, len(references.length_R))
        self._length_R = references.length_R

    def cider_d(self, matches: Matches) -> np.ndarray:
        """CIDEr-D of each candidate, float64: from 0 to 10, what pycocoevalcap calls CIDEr."""
        clipped_F = np.minimum(matches.count_E[matches.entry_F], matches.count_F)
        # pycocoevalcap counts a caption's pairs of words for its length.
        bigrams_C, bigrams_R = np.maximum(matches.length_C - 1, 0), np.maximum(self._length_R - 1, 0)
        difference_P = bigrams_C[matches.candidate_P] - bigrams_R[matches.reference_P]
        similar_P = self._cosine(matches, clipped_F) * np.exp(-(difference_P**2) / (2 * SIGMA**2))
        return 10 * _over_references(matches, similar_P)

    def cider(self, matches: Matches) -> np.ndarray:
        """The first formula of the paper, of each candidate, float64: from 0 to 1."""
        return _over_references(matches, self._cosine(matches, matches.count_E[matches.entry_F]))

    def _idf(self, images: np.ndarray) -> np.ndarray:
        return self._log_images - np.log(np.maximum(images, 1))

    def _cosine(self, matches: Matches, count_F: np.ndarray) -> np.ndarray:
        """The mean cosine of each pair over the orders, with these counts for the candidates."""
        idf_E = self._idf(matches.images_E)
        norm_CN = _norms(matches.candidate_E, matches.order_E, matches.count_E * idf_E, len(matches.length_C))
        norm_PN = norm_CN[matches.candidate_P] * self._norm_RN[matches.reference_P]
        product_F = idf_E[matches.entry_F] ** 2 * count_F * matches.count_F
        cell_F = matches.pair_F * ORDERS + matches.order_E[matches.entry_F]
        dot_PN = np.bincount(cell_F, product_F, norm_PN.size).reshape(-1, ORDERS)
        return np.divide(dot_PN, norm_PN, out=np.zeros_like(norm_PN), where=norm_PN > 0).mean(1)


def _norms(caption: np.ndarray, order: np.ndarray, weight: np.ndarray, captions: int) -> np.ndarray:
    """The lengths of the captions' vectors, float64 [captions, 4]."""
    return np.sqrt(np.bincount(caption * ORDERS + order, weight**2, captions * ORDERS)).reshape(-1, ORDERS)


def _over_references(matches: Matches, value_P: np.ndarray) -> np.ndarray:
    return np.bincount(matches.candidate_P, value_P, len(matches.length_C)) / matches.pairs_C
