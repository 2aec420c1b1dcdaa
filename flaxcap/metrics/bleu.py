"""BLEU-1 … BLEU-4 as pycocoevalcap's Bleu(4) gives them.

Papineni et al. 2002 (aclanthology.org/P02-1040), the brevity penalty taken from the reference whose length is closest,
of two the shorter. Two small constants, pycocoevalcap's, keep the logarithm of nothing away.
"""

import numpy as np

from flaxcap.metrics.ngrams import ORDERS, Matches, References

_TINY, _SMALL = 1e-15, 1e-9


def bleu(matches: Matches, references: References) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1 … 4 of the corpus, float64 [4], and of each candidate, float64 [candidates, 4]."""
    length_C = matches.length_C
    most_E = np.zeros(len(matches.count_E), np.int64)
    np.maximum.at(most_E, matches.entry_F, matches.count_F)
    correct_CN = np.bincount(
        matches.candidate_E * ORDERS + matches.order_E,
        np.minimum(most_E, matches.count_E),
        len(length_C) * ORDERS,
    ).reshape(-1, ORDERS)
    guessed_CN = np.maximum(length_C[:, None] - np.arange(ORDERS), 0)

    length_P = references.length_R[matches.reference_P]
    distance_P = np.abs(length_P - length_C[matches.candidate_P])
    order_P = np.lexsort((length_P, distance_P, matches.candidate_P))
    closest_C = length_P[order_P[np.cumsum(matches.pairs_C) - matches.pairs_C]]
    corpus = _bleu(correct_CN.sum(0), guessed_CN.sum(0), length_C.sum(keepdims=True), closest_C.sum(keepdims=True))
    return corpus, _bleu(correct_CN, guessed_CN, length_C[:, None], closest_C[:, None])


def _bleu(correct: np.ndarray, guessed: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return precision * np.exp(np.minimum(1 - 1 / ratio, 0))
