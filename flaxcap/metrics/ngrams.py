"""The n-grams that captions share with the references of their images: the counts behind BLEU and CIDEr.

The counts are kept in tables, each a group of arrays of one length:

    entry   a distinct n-gram of a caption
    pair    a candidate and one reference of its image
    hit     a candidate's entry that occurs in a reference of its image

N-grams have 1 to 4 words. An n-gram's order is its number of words less one: 0 to 3.

An n-gram is identified by a 64-bit hash of its words. COCO's captions have ten million distinct n-grams. Two of them
have the same hash with a probability of 3e-6, and such a collision would change one count.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flaxcap.errors import UserError

ORDERS = 4
Words = Sequence[str]  # of a tokenised caption
# Odd, so that multiplication loses no bit of a word's code. 3 modulo 4, so that word order costs one bit at most: the
# hashes of "a b" and "b a" differ by (a - b)(multiplier - 1), and multiplier - 1 has one factor 2.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C13)


class Matches(NamedTuple):
    """The n-grams of candidates, and their occurrences in the references of their images. All arrays are int64."""

    lengths: np.ndarray  # [candidates], words
    num_references: np.ndarray  # [candidates], of the candidate's image
    pair_candidate: np.ndarray  # [pairs], sorted
    pair_reference: np.ndarray  # [pairs], index among the references of all images
    entry_candidate: np.ndarray  # [entries], sorted
    entry_order: np.ndarray  # [entries]
    entry_count: np.ndarray  # [entries], in the candidate
    entry_images: np.ndarray  # [entries], images with the n-gram in a reference
    hit_entry: np.ndarray  # [hits]
    hit_pair: np.ndarray  # [hits]
    hit_count: np.ndarray  # [hits], in the reference


class References:
    """The n-grams of all images' references. Made once, matched with candidates many times.

    The arrays `entry_…` are the table of entries: `entry_reference`, `entry_order`, `entry_count` (in the reference)
    and `entry_images` (images with the n-gram in a reference). `lengths` are the references' words, `num_references`
    the references of each image.
    """

    def __init__(self, references: Sequence[Sequence[Words]]):
        """Counts the n-grams.

        Args:
          references: for each image, its tokenised references.

        Raises:
          UserError: there are no images, or an image has no reference.
        """
        self.num_references = np.array([len(some) for some in references], np.int64)
        if not len(self.num_references):
            raise UserError("references: found none, expected at least one for each image")
        if not self.num_references.all():
            image = int(np.argmin(self.num_references))
            raise UserError(f"image {image}, counted from 0: found no reference caption, expected at least one")
        self._first_reference = np.cumsum(self.num_references) - self.num_references
        captions = [words for some in references for words in some]
        self.lengths = np.array([len(words) for words in captions], np.int64)

        self._codes = _WordCodes()
        reference, order, hashes = _ngrams(captions, self._codes)
        # The last element exceeds every hash that is searched for, so a search never ends past the array.
        last = np.uint64(2**64 - 1)
        self._known_hashes, ngram = np.unique(np.append(hashes, last), return_inverse=True)
        self._num_known = len(self._known_hashes)
        entry_key, first, self.entry_count = np.unique(
            reference * self._num_known + ngram[:-1], return_index=True, return_counts=True
        )
        self._entry_key = np.append(entry_key, np.iinfo(np.int64).max)
        self.entry_reference, entry_ngram = np.divmod(entry_key, self._num_known)
        self.entry_order = order[first]
        image = np.repeat(np.arange(len(self.num_references)), self.num_references)[self.entry_reference]
        image_ngram = np.sort(image * self._num_known + entry_ngram)  # np.unique: 13 times as long (NumPy 2.4)
        image_ngram = image_ngram[np.diff(image_ngram, prepend=-1) > 0]
        self._ngram_images = np.bincount(image_ngram % self._num_known, minlength=self._num_known)
        self.entry_images = self._ngram_images[entry_ngram]

    def match(self, candidates: Sequence[Words], images: np.ndarray) -> Matches:
        """Counts the candidates' n-grams and finds them in the references.

        Args:
          candidates: tokenised captions.
          images: int64 [candidates], the index of each candidate's image among the references.
        """
        candidate, order, hashes = _ngrams(candidates, self._codes)
        ngram = np.searchsorted(self._known_hashes, hashes)
        (unknown,) = np.nonzero(self._known_hashes[ngram] != hashes)
        unknown_hashes, index = np.unique(hashes[unknown], return_inverse=True)
        ngram[unknown] = self._num_known + index
        num_ngrams = self._num_known + len(unknown_hashes)
        entry_key, first, entry_count = np.unique(candidate * num_ngrams + ngram, return_index=True, return_counts=True)
        entry_candidate, entry_ngram = np.divmod(entry_key, num_ngrams)
        entry_known = entry_ngram < self._num_known

        num_references, first_reference = self.num_references[images], self._first_reference[images]
        first_pair = np.cumsum(num_references) - num_references
        pair_candidate, pair_index = _expand(num_references)
        # Each known n-gram of a candidate is searched for in each reference.
        (known,) = np.nonzero(entry_known)
        search_known, search_index = _expand(num_references[entry_candidate[known]])
        search_entry = known[search_known]
        search_candidate = entry_candidate[search_entry]
        search_key = (first_reference[search_candidate] + search_index) * self._num_known + entry_ngram[search_entry]
        found_at = np.searchsorted(self._entry_key, search_key)
        hit = self._entry_key[found_at] == search_key
        return Matches(
            lengths=np.array([len(words) for words in candidates], np.int64),
            num_references=num_references,
            pair_candidate=pair_candidate,
            pair_reference=first_reference[pair_candidate] + pair_index,
            entry_candidate=entry_candidate,
            entry_order=order[first],
            entry_count=entry_count,
            entry_images=np.where(entry_known, self._ngram_images[np.where(entry_known, entry_ngram, 0)], 0),
            hit_entry=search_entry[hit],
            hit_pair=(first_pair[search_candidate] + search_index)[hit],
            hit_count=self.entry_count[found_at[hit]],
        )


class _WordCodes(dict[str, int]):
    """A 64-bit hash of each word, equal in every process."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = int.from_bytes(digest, "little")
        return self[word]


def _ngrams(captions: Sequence[Words], codes: _WordCodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the caption, the order and the hash (uint64) of every occurrence of an n-gram."""
    lengths = np.array([len(words) for words in captions], np.int64)
    caption = np.repeat(np.arange(len(lengths)), lengths)
    code = np.fromiter((codes[word] for words in captions for word in words), np.uint64, len(caption))
    words_left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(caption))
    rolling, parts = code, []
    for order in range(ORDERS):
        if order:
            rolling = rolling[:-1] * _MULTIPLIER + code[order:]
        (start,) = np.nonzero(words_left[: len(rolling)] > order)
        parts.append((caption[start], np.full(len(start), order), rolling[start] + np.uint64(order)))
    captions_, orders, hashes = (np.concatenate(some) for some in zip(*parts, strict=True))
    return captions_, orders, hashes


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each index `counts` times, and its repetitions' numbers: [2, 3] -> [0, 0, 1, 1, 1], [0, 1, 0, 1, 2]."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
