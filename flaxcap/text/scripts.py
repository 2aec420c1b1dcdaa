"""Scripts that are written without spaces between words: their characters, and the spacing of their text."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from flaxcap.text.words import JOINERS, TSHEG, phrases, words

_BLOCKS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # Han radicals
    (0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x3035), (0x3038, 0x303C),  # Han numerals and repetition marks
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo, strokes, small Katakana
    (0x3400, 0x4DBF), (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # Katakana, half as wide
    (0x16FE0, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B2FF),  # Kana, Nushu
    (0x20000, 0x3FFFF),  # Han
)  # fmt: skip
_SPACELESS = "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _BLOCKS) + "]"
_SPACELESS_CHARACTER = re.compile(_SPACELESS)
_OTHER_WORD = re.compile(rf"(?:(?!{_SPACELESS})[^\W_])+")

# Not combining marks by their category, but written around or after their base: Thai and Lao vowels AM, and the sound
# marks of half-width Katakana (Unicode's Grapheme_Cluster_Break SpacingMark and Extend).
_EXTENDING = frozenset(f"{JOINERS}\u0e33\u0eb3\uff9e\uff9f")
# Signs that write the following letter below: Myanmar, Khmer, Tai Tham, Balinese, Javanese.
_STACKING = frozenset("\u1039\u17d2\u1a60\u1b44\ua9c0")


def characters(word: str) -> list[str]:
    """Splits a word before each user-perceived character of a script without spaces: "2019年" -> ["2019", "年"].

    A combining mark stays with its base, and so does a letter that is stacked below it.
    """
    starts, spaceless = [], False
    for n, char in enumerate(word):
        if n and (_extends(char) or word[n - 1] in _STACKING):
            continue
        before, spaceless = spaceless, is_spaceless(char)
        if not n or before or spaceless:
            starts.append(n)
    return [word[a:b] for a, b in itertools.pairwise([*starts, len(word)])]


def split(caption: str) -> list[str]:
    """Returns a caption's characters in scripts without spaces, and its words in others. `join` is the inverse.

    A tsheg, which ends a Tibetan syllable, counts as a character.
    """
    found: list[str] = []
    for phrase in phrases(caption):
        if found and _is_tibetan(found[-1]) and _is_tibetan(phrase):
            found.append(TSHEG)  # punctuation stood there: it ends a syllable too
        found += characters(phrase)
    return found


def join(units: Sequence[str]) -> str:
    """Returns the text of characters and words: a space stands only between two words.

    Args:
      units: of `split`.
    """
    out = list(units[:1])
    for before, after in itertools.pairwise(units):
        between_words = not (is_spaceless(before[0]) or is_spaceless(after[0]))
        if between_words or _extends(after[0]) or before[-1] in _STACKING:  # the last two: only in misspelt text
            out.append(" ")
        out.append(after)
    return "".join(out)


def written_without_spaces(captions: Iterable[str]) -> bool:
    """Returns True if most of the text is of scripts without spaces. A character counts as much as a word of others.

    Words that someone separated by spaces make no difference: only the characters count.
    """
    spaceless = other = 0
    for caption in captions:
        if caption.isascii():
            other += len(caption.split())
        else:
            spaceless += len(_SPACELESS_CHARACTER.findall(caption))
            other += len(_OTHER_WORD.findall(caption))
    return spaceless > other


def by_character(caption: str) -> list[str]:
    """Returns the characters and words that scores count: those of `split`, without any tsheg."""
    return [unit for word in words(caption) for unit in characters(word)]


def is_spaceless(char: str) -> bool:
    """Returns True for a character of a script that is written without spaces between words."""
    return char > "\u0dff" and _SPACELESS_CHARACTER.match(char) is not None


def _extends(char: str) -> bool:
    return char in _EXTENDING or unicodedata.category(char)[0] == "M"


def _is_tibetan(text: str) -> bool:
    return "\u0f00" <= text[0] <= "\u0fff"
