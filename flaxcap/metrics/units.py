"""The unit that scores count: words, or characters in languages without spaces between words.

The unit follows from the references alone. So the captions of every model and program are scored alike on a data set,
whatever their tokenizer, and nobody can raise a score by another one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flaxcap.metrics import ptb
from flaxcap.text import scripts
from flaxcap.text.words import words


class Unit(NamedTuple):
    """A unit of text."""

    name: str  # "words" or "characters"
    tokenize: Callable[[str], list[str]]  # for scores
    split: Callable[[str], list[str]]  # for reports on captions


# BLEU, ROUGE-L and CIDEr of words equal pycocoevalcap's, because `ptb` is its tokeniser.
WORDS = Unit("words", ptb.tokenize, words)
CHARACTERS = Unit("characters", scripts.by_character, scripts.by_character)


def unit_of(references: Sequence[Sequence[str]]) -> Unit:
    """Returns CHARACTERS if most of the references' text is of scripts without spaces between words, else WORDS.

    Words of other scripts stay complete in CHARACTERS. References in which someone separated Chinese words by spaces
    are scored by character too.
    """
    without_spaces = scripts.written_without_spaces(caption for some in references for caption in some)
    return CHARACTERS if without_spaces else WORDS
