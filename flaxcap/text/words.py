"""Captions split into words: lower case, Unicode-normalised, without punctuation."""

import unicodedata


class _WordCharacters(dict):
    """Table for `str.translate`: punctuation and symbols become spaces, other characters stay.

    An entry is made when its character first occurs.
    """

    def __missing__(self, code: int) -> int:
        char = chr(code)
        if char == "\N{RIGHT SINGLE QUOTATION MARK}":
            char = "'"
        keep = char == "'" or unicodedata.category(char)[0] not in "PSCZ"
        self[code] = ord(char) if keep else ord(" ")
        return self[code]


_WORD_CHARACTERS = _WordCharacters()


def words(caption: str) -> list[str]:
    """Returns a caption's words: "A dog's ball, thrown!" -> ["a", "dog's", "ball", "thrown"].

    An apostrophe inside a word is part of it.
    """
    # Normalised after lower(): "J" and U+030C have no composed form, but their lower case has one, "ǰ".
    text = unicodedata.normalize("NFC", caption.lower()).translate(_WORD_CHARACTERS)
    return [w for w in (w.strip("'") for w in text.split()) if w]
