"""Which n-grams of a caption the references of its image have: what BLEU and CIDEr are made of.

Letters of the shapes: I images, R references (of all images, one after the other), C candidates, P pairs of a candidate
and a reference of its image, G n-grams of the references, K the same reference by reference, E those of the candidates,
F finds: an n-gram of a candidate in a reference, T places in the captions, N = 4 orders.

An n-gram is known by a 64-bit hash of its words. The ten million n-grams of COCO's captions hold two of the same hash
with a probability of 3e-6, and that would change one count.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flaxcap.errors import UserError

ORDERS = 4
Words = Sequence[str]  # of a tokenised caption
# Odd, so that no bit of a word is lost, and 3 modulo 4, so that no more than one of the order of two words is.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C13)


class Matches(NamedTuple):
    """Candidates against the references of their images; all int64."""

    length_C: np.ndarray  # words
    pairs_C: np.ndarray  # references
    candidate_P: np.ndarray
    reference_P: np.ndarray
    candidate_E: np.ndarray
    order_E: np.ndarray  # words of the n-gram, less one
    count_E: np.ndarray  # how often the candidate has it
    images_E: np.ndarray  # how many images have a reference with it
    entry_F: np.ndarray
    pair_F: np.ndarray
    count_F: np.ndarray  # how often the reference has it


class References:
    """The n-grams of every image's references, counted once."""

    def __init__(self, references: Sequence[Sequence[Words]]):
        """`references`: for each image, its tokenised references. UserError if an image has none."""
        self.count_I = np.array([len(some) for some in references], np.int64)
        if not len(self.count_I):
            raise UserError("there are no references to score captions with")
        if not self.count_I.all():
            raise UserError(f"image {int(np.argmin(self.count_I))}, counted from 0, has no reference caption")
        self.first_I = np.cumsum(self.count_I) - self.count_I
        flat = [words for some in references for words in some]
        self.length_R = np.array([len(words) for words in flat], np.int64)

        self._codes = _Codes()
        reference_T, order_T, hash_T = _ngrams(flat, self._codes)
        # A last element greater than any that is looked for: a search always ends at an element.
        last = np.uint64(2**64 - 1)
        self._hash_G, at_T = np.unique(np.append(hash_T, last), return_inverse=True)
        self._G = len(self._hash_G)
        key_K, index_K, self.count_K = np.unique(
            reference_T * self._G + at_T[:-1], return_index=True, return_counts=True
        )
        self._key_K = np.append(key_K, np.iinfo(np.int64).max)
        self.reference_K, ngram_K = np.divmod(key_K, self._G)
        self.order_K = order_T[index_K]
        image_K = np.repeat(np.arange(len(self.count_I)), self.count_I)[self.reference_K]
        seen = np.sort(image_K * self._G + ngram_K)  # np.unique alone would be ten times as slow
        seen = seen[np.diff(seen, prepend=-1) > 0]
        self._images_G = np.bincount(seen % self._G, minlength=self._G)
        self.images_K = self._images_G[ngram_K]

    def match(self, candidates: Sequence[Words], image_C: np.ndarray) -> Matches:
        """`image_C`: the place of each candidate's image among the references."""
        candidate_T, order_T, hash_T = _ngrams(candidates, self._codes)
        ngram_T = np.searchsorted(self._hash_G, hash_T)
        (new,) = np.nonzero(self._hash_G[ngram_T] != hash_T)
        new_hashes, place = np.unique(hash_T[new], return_inverse=True)
        ngram_T[new] = self._G + place
        size = self._G + len(new_hashes)
        key_E, index_E, count_E = np.unique(candidate_T * size + ngram_T, return_index=True, return_counts=True)
        candidate_E, ngram_E = np.divmod(key_E, size)
        known_E = ngram_E < self._G

        pairs_C, first_C = self.count_I[image_C], self.first_I[image_C]
        start_C = np.cumsum(pairs_C) - pairs_C
        candidate_P, rank_P = _expand(pairs_C)
        # Each known n-gram of a candidate is looked for in each reference.
        (entries,) = np.nonzero(known_E)
        entry, rank = _expand(pairs_C[candidate_E[entries]])
        entry = entries[entry]
        candidate = candidate_E[entry]
        key = (first_C[candidate] + rank) * self._G + ngram_E[entry]
        at = np.searchsorted(self._key_K, key)
        found = self._key_K[at] == key
        return Matches(
            length_C=np.array([len(words) for words in candidates], np.int64),
            pairs_C=pairs_C,
            candidate_P=candidate_P,
            reference_P=first_C[candidate_P] + rank_P,
            candidate_E=candidate_E,
            order_E=order_T[index_E],
            count_E=count_E,
            images_E=np.where(known_E, self._images_G[np.where(known_E, ngram_E, 0)], 0),
            entry_F=entry[found],
            pair_F=(start_C[candidate] + rank)[found],
            count_F=self.count_K[at[found]],
        )


class _Codes(dict[str, int]):
    """A 64-bit hash of each word, the same in every process."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = int.from_bytes(digest, "little")
        return self[word]


def _ngrams(captions: Sequence[Words], codes: _Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """caption_T, order_T and hash_T (uint64) of every n-gram at every place."""
    lengths = np.array([len(words) for words in captions], np.int64)
    caption = np.repeat(np.arange(len(lengths)), lengths)
    code = np.fromiter((codes[word] for words in captions for word in words), np.uint64, len(caption))
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(caption))
    rolling, parts = code, []
    for order in range(ORDERS):
        if order:
            rolling = rolling[:-1] * _MULTIPLIER + code[order:]
        (at,) = np.nonzero(left[: len(rolling)] > order)
        parts.append((caption[at], np.full(len(at), order), rolling[at] + np.uint64(order)))
    caption_T, order_T, hash_T = (np.concatenate(some) for some in zip(*parts, strict=True))
    return caption_T, order_T, hash_T


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2, 3] -> [0, 0, 1, 1, 1] and [0, 1, 0, 1, 2]."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
