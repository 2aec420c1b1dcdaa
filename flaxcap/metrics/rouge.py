"""ROUGE-L, equal to pycocoevalcap's Rouge.

Lin 2004 (aclanthology.org/W04-1013), section 3: the F-measure (beta = 1.2) of the longest common subsequence, from the
best precision and the best recall over an image's references.
"""

from collections.abc import Sequence

from flaxcap.metrics.ngrams import Words

BETA = 1.2


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """Returns a score from 0 to 1. As in pycocoevalcap, a caption without words has one empty word."""
    candidate = candidate or [""]
    masks: dict[str, int] = {}
    for position, word in enumerate(candidate):
        masks[word] = masks.get(word, 0) | 1 << position
    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = _longest_common_subsequence(masks, len(candidate), reference)
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / len(reference))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(masks: dict[str, int], length: int, words: Words) -> int:
    """Returns the length of the longest common subsequence of `words` and another caption.

    The algorithm is bit-parallel (Hyyrö 2004): an integer stands for a row of the dynamic-programming table, with a
    zero at each position where the row increases.

    Args:
      masks: by word of the other caption, a bit for each of its positions.
      length: words of the other caption.
      words: this caption.
    """
    row = full = (1 << length) - 1
    for word in words:
        if mask := masks.get(word):
            taken = row & mask
            row = (row + taken | row - taken) & full
    return length - row.bit_count()
