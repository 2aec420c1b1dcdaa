"""Captions split into words: lower case, Unicode-normalised, without punctuation and invisible characters."""

import unicodedata

# Zero width non-joiner and joiner. They are spelling inside words of Persian, Hindi, Malayalam, Sinhala and others.
JOINERS = "\u200c\u200d"
# Stands between the syllables of Tibetan words: a letter for `phrases`, a space for `words`.
TSHEG = "\N{TIBETAN MARK INTERSYLLABIC TSHEG}"

_REPLACED = {"\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{TIBETAN MARK DELIMITER TSHEG BSTAR}": TSHEG}
_KEPT = frozenset(f"'{TSHEG}{JOINERS}")
# Format characters (category Cf) that are visible, or that stand between two texts.
_VISIBLE_FORMAT = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"  # Arabic and Indic signs
    "\u200b"  # zero width space
    "\ufff9\ufffa\ufffb"  # annotations: the text and its reading
)
_FILLERS = "\u115f\u1160"  # stand for a missing letter of a Hangul syllable
_BLANKS = "\u3164\uffa0"  # letters by their category, blank by their look
# Invisible, or drawn around another character, though their category is not Cf: the combining grapheme joiner, Khmer
# inherent vowels, variation selectors, keycaps.
_REMOVED = frozenset("\u034f\u17b4\u17b5\u20e3")
_VARIATION_SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
_VIRAMA = 9  # canonical combining class


class _WordCharacters(dict[int, int | None]):
    """Table for `str.translate`: punctuation and symbols become spaces, invisible characters go, others stay.

    An entry is made when its character first occurs.
    """

    def __missing__(self, code: int) -> int | None:
        char = _REPLACED.get(chr(code), chr(code))
        category = unicodedata.category(char)
        if char in _KEPT:
            self[code] = ord(char)
        elif (
            char in _REMOVED
            or any(code in some for some in _VARIATION_SELECTORS)
            or (category == "Cf" and char not in _VISIBLE_FORMAT)
        ):
            self[code] = None
        else:
            self[code] = ord(" ") if category[0] in "PSCZ" or char in _BLANKS else ord(char)
        return self[code]


_WORD_CHARACTERS = _WordCharacters()


def words(caption: str) -> list[str]:
    """Returns a caption's words: "A dog's ball, thrown!" -> ["a", "dog's", "ball", "thrown"].

    A word contains the apostrophes, joiners and combining marks inside it. No word begins with one of these. Soft
    hyphens, direction marks and other invisible characters are removed. A zero width space separates words.
    """
    return _split(_cleaned(caption).replace(TSHEG, " "))


def phrases(caption: str) -> list[str]:
    """Returns `words`, but those that only a Tibetan tsheg separates stay together, with the tsheg."""
    return _split(_cleaned(caption))


def _cleaned(caption: str) -> str:
    if caption.isascii():
        return caption.translate(_WORD_CHARACTERS).lower()
    # The first normalisation gives composed and decomposed text the same characters. The second one composes what
    # lower() and the removal of characters brought together: "J" and U+030C have no composed form, but "ǰ" is one.
    text = unicodedata.normalize("NFC", caption).translate(_WORD_CHARACTERS)
    return unicodedata.normalize("NFC", text.lower())


def _split(text: str) -> list[str]:
    return [w for w in map(_trimmed, text.split()) if w]


def _trimmed(word: str) -> str:
    """Returns a word without the characters that only belong inside one."""
    if word.isascii():
        return word.strip("'")
    start, end = 0, len(word)
    while start < end and (_belongs_inside(word[start]) or unicodedata.category(word[start])[0] == "M"):
        start += 1
    while start < end and _belongs_inside(word[end - 1]):
        # After a virama the joiner is spelling: Malayalam's word-final consonants (chillus) were written so until
        # Unicode 5.1 gave them letters.
        if word[end - 1] == "\u200d" and end - start > 1 and unicodedata.combining(word[end - 2]) == _VIRAMA:
            break
        end -= 1
    return word[start:end]


def _belongs_inside(char: str) -> bool:
    return char in _KEPT or char in _FILLERS
