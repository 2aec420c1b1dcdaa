"""ROUGE-L as pycocoevalcap's Rouge gives it.

Lin 2004 (aclanthology.org/W04-1013), section 3: the F-measure (beta = 1.2) of the longest common subsequence, with the
best precision and the best recall over an image's references.
"""

from collections.abc import Sequence

from flaxcap.metrics.ngrams import Words

BETA = 1.2


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """From 0 to 1. As there, a caption without words has one word, which is empty."""
    candidate = candidate or [""]
    masks: dict[str, int] = {}
    for place, word in enumerate(candidate):
        masks[word] = masks.get(word, 0) | 1 << place
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
    """Its length. `masks`: a bit for each place of a word in the other caption, which has `length` words.

    Bit-parallel (Hyyrö 2004): the row of the usual table is the integer whose zeros mark where it rises.
    """
    row = full = (1 << length) - 1
    for word in words:
        if mask := masks.get(word):
            taken = row & mask
            row = (row + taken | row - taken) & full
    return length - row.bit_count()
