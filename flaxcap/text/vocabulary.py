"""The vocabulary: words to token ids and back."""

import collections
import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from flaxcap.errors import UserError, quoted
from flaxcap.text.words import words

PAD, UNK, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
# Not words: the hash joins words by line ends, and a terminal executes control characters.
_NOT_A_WORD = re.compile("^$|[\\0- \\x7f-\\x9f]")


class VocabularyError(UserError):
    """A damaged vocabulary file, or captions without any word."""


class Vocabulary:
    """The tokens by id; ids 0 to 3 are <pad>, <unk>, <start>, <end>."""

    def __init__(self, tokens: Sequence[str]):
        """Makes a vocabulary of all its tokens, in the order of their ids.

        Args:
          tokens: the four of `SPECIAL`, then the words.

        Raises:
          VocabularyError: the first four are not `SPECIAL`, or a token is repeated.
        """
        self.tokens = tuple(tokens)
        self.ids = {w: i for i, w in enumerate(self.tokens)}
        if self.tokens[:4] != SPECIAL or len(self.ids) != len(self.tokens):
            raise VocabularyError(f"a vocabulary starts with {', '.join(SPECIAL)} and repeats no word")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_captions(cls, captions: Iterable[str], size: int) -> "Vocabulary":
        """Makes a vocabulary of the `size` most frequent words; ties go to the alphabetically first.

        Args:
          captions: the training captions.
          size: words, the special tokens not counted.

        Raises:
          VocabularyError: the captions contain no word.
        """
        counts = collections.Counter(w for caption in captions for w in words(caption))
        if not counts:
            raise VocabularyError("the training captions contain no word")
        best = sorted(counts, key=lambda w: (-counts[w], w))[:size]
        return cls([*SPECIAL, *best])

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Returns <start>, the words' ids, <end>: at most `max_length` ids. Further words are dropped."""
        ids = [self.ids.get(w, UNK) for w in words(caption)]
        return [START, *ids[: max_length - 2], END]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the words up to the first <end>, without <pad> and <start>."""
        out = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, START):
                out.append(self.tokens[i])
        return " ".join(out)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the tokens in the order of their ids."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"hash": self.hash, "tokens": self.tokens}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Vocabulary":
        """Parses the JSON that `to_json` wrote.

        Args:
          text: the JSON.
          where: the file's name, for messages.

        Raises:
          VocabularyError: the JSON is damaged, its tokens do not match its hash, or a token is not a word.
        """
        try:
            saved = json.loads(text)
            found = cls(saved["tokens"])
            if found.hash != saved["hash"]:
                raise VocabularyError("the words do not match their hash")
            wrong = [word for word in found.tokens if _NOT_A_WORD.search(word)]
            if wrong:
                raise VocabularyError(f"found {quoted(wrong[0])}, expected a word")
        except KeyError as e:
            raise VocabularyError(f"{where}: not a vocabulary: found no {e}") from e
        except (ValueError, TypeError, RecursionError) as e:
            raise VocabularyError(f"{where}: not a vocabulary: {e}") from e
        return found
