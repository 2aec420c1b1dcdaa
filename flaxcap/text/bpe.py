"""Byte pair encoding (Sennrich et al. 2016, aclanthology.org/P16-1162) of captions.

The package sentencepiece learns the pieces from the training captions. It needs no other package, gives the same pieces
whatever the order of captions, and never reads a file: the pieces in the order of their merges are the complete model,
and a vocabulary stores them as text. So a downloaded model reaches no parser of sentencepiece, and captioning needs no
sentencepiece. The package tokenizers would need ten others, among them programs for downloads.

A word begins with the mark "▁". A phrase of a script without spaces counts as a word.
"""

import collections
import functools
import heapq
import importlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence

from flaxcap.errors import UserError
from flaxcap.text import scripts

BEGIN = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark; `words` removes it from captions, as a symbol
LEAST_MERGES = 2  # in the training captions; a piece that occurs once cannot be learned
# Characters of a piece. Without spaces pieces would become half captions.
_LONGEST, _LONGEST_SPACELESS = 16, 8


class MissingBpeError(UserError):
    """The package sentencepiece is not installed."""


class Merger:
    """Splits words into pieces: merges neighbours, the pair of the first learned piece first."""

    def __init__(self, pieces: Sequence[str]):
        """Takes the pieces in the order in which they were learned."""
        self._ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self._pieces = functools.lru_cache(maxsize=1 << 16)(lambda word: tuple(self.merge(word)[0]))

    def __call__(self, word: str) -> tuple[str, ...]:
        """Returns the pieces of a word with its mark; characters that no piece has stay alone."""
        return self._pieces(word)

    def merge(self, word: str) -> tuple[list[str], list[str]]:
        """Returns the pieces of a word with its mark, and the result of each merge in order."""
        parts, end = list(word), len(word)
        after, before = list(range(1, end + 1)), list(range(-1, end - 1))
        heap: list[tuple[int, int]] = []
        made: list[str] = []

        def add(n: int) -> None:
            if n >= 0 and after[n] < end and (rank := self._ranks.get(parts[n] + parts[after[n]])) is not None:
                heapq.heappush(heap, (rank, n))

        for n in range(end):
            add(n)
        while heap:
            rank, n = heapq.heappop(heap)
            m = after[n]
            # An older entry: one of its two parts was merged with another.
            if not parts[n] or m >= end or self._ranks.get(parts[n] + parts[m]) != rank:
                continue
            parts[n], parts[m] = parts[n] + parts[m], ""
            after[n] = after[m]
            if after[n] < end:
                before[after[n]] = n
            made.append(parts[n])
            add(before[n])
            add(n)
        return [part for part in parts if part], made


def marked_words(caption: str) -> list[str]:
    """Returns the words of a caption with their marks; text of scripts without spaces is not split."""
    return [BEGIN + word for word in scripts.join(scripts.split(caption)).split(" ") if word]


def learn(captions: Iterable[str], size: int) -> list[str]:
    """Returns the pieces of captions in the order in which they merge, then the characters by their frequency.

    Args:
      captions: the training captions.
      size: most pieces. A piece that would merge less than `LEAST_MERGES` times is left out. If the captions have more
        different characters than `size`, the rare ones are left out, and nothing merges.

    Returns:
      No piece if the captions have no word.

    Raises:
      MissingBpeError: sentencepiece is not installed.
    """
    found = collections.Counter(word for caption in captions for word in marked_words(caption))
    if not found:
        return []
    counts = _sum(found, list)
    alphabet = sorted(counts, key=lambda char: (-counts[char], char))
    if len(alphabet) >= size:
        return alphabet[:size]
    learned = [piece for piece in _train(found, size) if len(piece) > 1]
    merger = Merger([*learned, *alphabet])
    made = _sum(found, lambda word: merger.merge(word)[1])
    return [*(piece for piece in learned if made[piece] >= LEAST_MERGES), *alphabet]


def _sum(found: Mapping[str, int], parts: Callable[[str], Iterable[str]]) -> "collections.Counter[str]":
    """Counts the parts of words, of which each occurs as often as `found` says."""
    counts = collections.Counter[str]()
    for word, times in found.items():
        for part in parts(word):
            counts[part] += times
    return counts


def _train(found: Mapping[str, int], size: int) -> list[str]:
    """Returns sentencepiece's pieces, of words by their number."""
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError as e:
        raise MissingBpeError(
            f"--config.data.tokenizer=bpe: found no package sentencepiece ({e}); install it by"
            ' `pip install "flaxcap[bpe]"`'
        ) from e
    model = io.BytesIO()
    words = sorted(found)
    spaceless = scripts.written_without_spaces(words)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(word.removeprefix(BEGIN) for word in words for _ in range(found[word])),
        model_writer=model,
        model_type="bpe",
        vocab_size=size + 1,  # with its <unk>
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=_LONGEST_SPACELESS if spaceless else _LONGEST,
        max_sentence_length=1 << 20,
        normalization_rule_name="identity",
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(n) for n in range(1, processor.get_piece_size())]
