"""Captions as token ids, and back.

Words are lower-case, without punctuation (an apostrophe inside a word stays); the vocabulary is
made of the training captions alone.
"""

import collections
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flaxcap.errors import UserError, quoted

PAD, UNK, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
_NO_WORD = re.compile("^$|[\\0- \\x7f-\\x9f]")  # would break the hash's lines, or be obeyed by a terminal


class VocabularyError(UserError):
    """A vocabulary file that cannot be used, or captions that none can be made of."""


class _Filter(dict):
    """For `str.translate`: punctuation and symbols become spaces; filled character by character as they occur."""

    def __missing__(self, code: int) -> int:
        char = chr(code)
        if char == "\N{RIGHT SINGLE QUOTATION MARK}":
            char = "'"
        keep = char == "'" or unicodedata.category(char)[0] not in "PSCZ"
        self[code] = ord(char) if keep else ord(" ")
        return self[code]


_FILTER = _Filter()


def words(caption: str) -> list[str]:
    """A caption's words: "A dog's ball, thrown!" -> ["a", "dog's", "ball", "thrown"]."""
    # NFC comes after lower(), which can leave a letter and its accent apart.
    text = unicodedata.normalize("NFC", caption.lower()).translate(_FILTER)
    return [w for w in (w.strip("'") for w in text.split()) if w]


class Vocabulary:
    """Words by token id; ids 0 to 3 are <pad>, <unk>, <start>, <end>."""

    def __init__(self, known: Sequence[str]):
        """`known`: every token by id, the four special ones first. VocabularyError if they are not, or one is twice."""
        self.tokens = tuple(known)
        self.ids = {w: i for i, w in enumerate(self.tokens)}
        if self.tokens[:4] != SPECIAL or len(self.ids) != len(self.tokens):
            raise VocabularyError(f"a vocabulary starts with {', '.join(SPECIAL)} and has no word twice")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_captions(cls, captions: Iterable[str], size: int) -> "Vocabulary":
        """The `size` most frequent words, of equals the alphabetically first. VocabularyError if there are none."""
        counts = collections.Counter(w for caption in captions for w in words(caption))
        if not counts:
            raise VocabularyError("the training captions hold no word")
        best = sorted(counts, key=lambda w: (-counts[w], w))[:size]
        return cls([*SPECIAL, *best])

    def encode(self, caption: str, max_length: int) -> list[int]:
        """<start>, the words' ids, <end>: at most `max_length` ids, the words beyond left out."""
        ids = [self.ids.get(w, UNK) for w in words(caption)]
        return [START, *ids[: max_length - 2], END]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the first <end>; <pad> and <start> are not words."""
        out = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, START):
                out.append(self.tokens[i])
        return " ".join(out)

    @property
    def hash(self) -> str:
        """sha256 (hex) of the words in their order."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"hash": self.hash, "tokens": self.tokens}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Vocabulary":
        """VocabularyError, naming `where`, unless it holds words, and those that were saved."""
        try:
            saved = json.loads(text)
            found = cls(saved["tokens"])
            if found.hash != saved["hash"]:
                raise VocabularyError("the words do not match their hash")
            wrong = [word for word in found.tokens if _NO_WORD.search(word)]
            if wrong:
                raise VocabularyError(f"found {quoted(wrong[0])}, expected a word")
        except KeyError as e:
            raise VocabularyError(f"{where}: not a vocabulary: found no {e}") from e
        except (ValueError, TypeError, RecursionError) as e:
            raise VocabularyError(f"{where}: not a vocabulary: {e}") from e
        return found


class Tokens(NamedTuple):
    """The captions of a split, ragged: caption m is `ids[starts[m]:starts[m+1]]` and tells of image `rows[m]`."""

    ids: np.ndarray  # int32 [all tokens]
    starts: np.ndarray  # int64 [captions + 1]
    rows: np.ndarray  # int32 [captions], not decreasing

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]], vocabulary: Vocabulary, max_length: int) -> "Tokens":
        """`captions`: for each image, in the store's order, its captions."""
        ids: list[int] = []
        starts, rows = [0], []
        for row, texts in enumerate(captions):
            for text in texts:
                ids += vocabulary.encode(text, max_length)
                starts.append(len(ids))
                rows.append(row)
        return cls(np.array(ids, np.int32), np.array(starts, np.int64), np.array(rows, np.int32))
