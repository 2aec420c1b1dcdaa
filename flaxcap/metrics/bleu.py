"""BLEU-1 to BLEU-4, equal to pycocoevalcap's Bleu(4).

Papineni et al. 2002 (aclanthology.org/P02-1040). The brevity penalty compares with the reference of the closest length,
and with the shorter one of two equally close. pycocoevalcap's two constants avoid the logarithm of zero.
"""

import numpy as np

from flaxcap.metrics.ngrams import ORDERS, Matches, References

_TINY, _SMALL = 1e-15, 1e-9


def bleu(matches: Matches, references: References) -> tuple[np.ndarray, np.ndarray]:
    """Returns BLEU-1 to BLEU-4 of the corpus, float64 [4], and of each candidate, float64 [candidates, 4]."""
    # A candidate's n-gram counts at most as often as in the reference that has it most often.
    limit = np.zeros(len(matches.entry_count), np.int64)
    np.maximum.at(limit, matches.hit_entry, matches.hit_count)
    correct = np.bincount(
        matches.entry_candidate * ORDERS + matches.entry_order,
        np.minimum(limit, matches.entry_count),
        len(matches.lengths) * ORDERS,
    ).reshape(-1, ORDERS)
    total = np.maximum(matches.lengths[:, None] - np.arange(ORDERS), 0)

    pair_length = references.lengths[matches.pair_reference]
    pair_distance = np.abs(pair_length - matches.lengths[matches.pair_candidate])
    by_distance = np.lexsort((pair_length, pair_distance, matches.pair_candidate))
    first_pair = np.cumsum(matches.num_references) - matches.num_references
    closest = pair_length[by_distance[first_pair]]
    corpus = _bleu(correct.sum(0), total.sum(0), matches.lengths.sum(keepdims=True), closest.sum(keepdims=True))
    return corpus, _bleu(correct, total, matches.lengths[:, None], closest[:, None])


def _bleu(correct: np.ndarray, total: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    precision = np.cumprod((correct + _TINY) / (total + _SMALL), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return precision * np.exp(np.minimum(1 - 1 / ratio, 0))
