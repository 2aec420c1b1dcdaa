"""The vocabulary: captions to token ids and back."""

import collections
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence

from flaxcap.errors import UserError, quoted
from flaxcap.text import bpe, tokenizers

PAD, UNK, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
# Not tokens: the hash joins tokens by line ends, and a terminal executes control characters.
_NOT_A_TOKEN = re.compile("^$|[\\0- \\x7f-\\x9f]")


class VocabularyError(UserError):
    """A damaged vocabulary file, or captions without any word."""


class Vocabulary:
    """The tokens by id, and the tokenizer that makes them; ids 0 to 3 are <pad>, <unk>, <start>, <end>."""

    def __init__(self, tokens: Sequence[str], tokenizer: str = "words"):
        """Makes a vocabulary of all its tokens, in the order of their ids.

        Args:
          tokens: the four of `SPECIAL`, then the tokenizer's.
          tokenizer: a name of `text.tokenizers`.

        Raises:
          VocabularyError: the first four are not `SPECIAL`, or a token is repeated.
          UserError: there is no such tokenizer.
        """
        self.tokens = tuple(tokens)
        self.ids = {w: i for i, w in enumerate(self.tokens)}
        self.tokenizer_name = tokenizer
        self.tokenizer = tokenizers.make(tokenizer, self.tokens[len(SPECIAL) :])
        if self.tokens[:4] != SPECIAL or len(self.ids) != len(self.tokens):
            raise VocabularyError(f"a vocabulary starts with {', '.join(SPECIAL)} and repeats no word")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_captions(cls, captions: Iterable[str], size: int, tokenizer: str = "words") -> "Vocabulary":
        """Makes a vocabulary of the `size` most frequent tokens; ties go to the alphabetically first.

        The tokens of tokenizer `bpe` are learned, see `text.bpe.learn`.

        Args:
          captions: the training captions.
          size: tokens, the special ones not counted.
          tokenizer: a name of `text.tokenizers`.

        Raises:
          VocabularyError: the captions contain no word.
          UserError: there is no such tokenizer, or it lacks a package.
        """
        if tokenizer == "bpe":
            best = bpe.learn(captions, size)
        else:
            split = tokenizers.make(tokenizer, ()).split
            counts = collections.Counter(token for caption in captions for token in split(caption))
            best = sorted(counts, key=lambda token: (-counts[token], token))[:size]
        if not best:
            raise VocabularyError("the training captions contain no word")
        return cls([*SPECIAL, *best], tokenizer)

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Returns <start>, the tokens' ids, <end>: at most `max_length` ids. Further tokens are dropped."""
        ids = [self.ids.get(token, UNK) for token in self.tokenizer.split(caption)]
        return [START, *ids[: max_length - 2], END]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first <end>, without <pad> and <start>."""
        return self.tokenizer.join(self.tokens_of(ids))

    def tokens_of(self, ids: Iterable[int]) -> list[str]:
        """Returns the tokens up to the first <end>, without <pad> and <start>."""
        before_end = itertools.takewhile(lambda i: i != END, ids)
        return [self.tokens[i] for i in before_end if i not in (PAD, START)]

    def id_of_word(self, word: str) -> int | None:
        """Returns the id of the token that stands for a whole word; None if there is none."""
        return self.ids.get(self.tokenizer.token_of(word))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the tokenizer's name and the tokens in the order of their ids."""
        return hashlib.sha256("\n".join([self.tokenizer_name, *self.tokens]).encode()).hexdigest()

    def to_json(self) -> str:
        saved = {"hash": self.hash, "tokenizer": self.tokenizer_name, "tokens": self.tokens}
        return json.dumps(saved, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Vocabulary":
        """Parses the JSON that `to_json` wrote.

        Args:
          text: the JSON.
          where: the file's name, for messages.

        Raises:
          VocabularyError: the JSON is damaged, its tokens do not match its hash, or a token cannot be text.
        """
        try:
            saved = json.loads(text)
            found = cls(saved["tokens"], saved["tokenizer"])
            if found.hash != saved["hash"]:
                raise VocabularyError("the words do not match their hash")
            wrong = [word for word in found.tokens if _NOT_A_TOKEN.search(word)]
            if wrong:
                raise VocabularyError(f"found {quoted(wrong[0])}, expected a word")
        except KeyError as e:
            raise VocabularyError(f"{where}: not a vocabulary: found no {e}") from e
        except (ValueError, TypeError, RecursionError) as e:
            raise VocabularyError(f"{where}: not a vocabulary: {e}") from e
        return found
