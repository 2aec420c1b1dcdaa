"""Tokenizers: captions to tokens and back, by the name of --config.data.tokenizer.

| name       | tokens                                                                                     |
|------------|--------------------------------------------------------------------------------------------|
| words      | words, see `text.words`                                                                    |
| characters | characters in scripts without spaces between words, words in others, see `text.scripts`    |
| bpe        | pieces of words, learned from the training captions, see `text.bpe`                        |

A tokenizer is made of its name and the vocabulary's tokens alone. So vocabulary.json holds all of it.
"""

from collections.abc import Sequence
from typing import Protocol

from flaxcap.errors import UserError, quoted
from flaxcap.text import bpe, scripts
from flaxcap.text.words import words


class Tokenizer(Protocol):
    """Splits captions into tokens, and writes tokens as text."""

    def split(self, caption: str) -> list[str]:
        """Returns a caption's tokens; those that are not in the vocabulary are unknown."""
        ...

    def join(self, tokens: Sequence[str]) -> str:
        """Returns the text of tokens, with the spaces of its language."""
        ...

    def token_of(self, word: str) -> str:
        """Returns the token that stands for a whole word alone."""
        ...


class WordTokenizer:
    """Words, with spaces between them."""

    def split(self, caption: str) -> list[str]:
        return words(caption)

    def join(self, tokens: Sequence[str]) -> str:
        return " ".join(tokens)

    def token_of(self, word: str) -> str:
        return word


class CharacterTokenizer(WordTokenizer):
    """Characters in scripts without spaces between words, words in others."""

    def split(self, caption: str) -> list[str]:
        return scripts.split(caption)

    def join(self, tokens: Sequence[str]) -> str:
        return scripts.join(tokens)


class BpeTokenizer:
    """Pieces of words, of byte pair encoding."""

    def __init__(self, pieces: Sequence[str]):
        self._merger = bpe.Merger(pieces)

    def split(self, caption: str) -> list[str]:
        return [piece for word in bpe.marked_words(caption) for piece in self._merger(word)]

    def join(self, tokens: Sequence[str]) -> str:
        return " ".join("".join(tokens).replace(bpe.BEGIN, " ").split())

    def token_of(self, word: str) -> str:
        return bpe.BEGIN + word


NAMES = ("words", "characters", "bpe")


def make(name: str, tokens: Sequence[str]) -> Tokenizer:
    """Returns the tokenizer of a vocabulary.

    Args:
      name: one of `NAMES`.
      tokens: of the vocabulary, without the special ones, in the order of their ids.

    Raises:
      UserError: there is no such tokenizer.
    """
    if name == "words":
        return WordTokenizer()
    if name == "characters":
        return CharacterTokenizer()
    if name == "bpe":
        return BpeTokenizer(tokens)
    raise UserError(f"tokenizer: found {quoted(name)}, expected one of {', '.join(NAMES)}")
