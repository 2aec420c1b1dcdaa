"""Captions as words, in many scripts."""

import unicodedata

import pytest
from hard_captions import CAPTIONS
from hypothesis import given

from flaxcap.text.words import JOINERS, words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs.", ["a", "dog", "runs"]),
        ("", []),
        (" \t\r\n\u00a0\u2028", []),
        ("?!... --- \u2014 ***", []),
        ("Black-and-white, close-up", ["black", "and", "white", "close", "up"]),
        ("The dog's ball; the dogs' ball; 'quoted'", ["the", "dog's", "ball", "the", "dogs", "ball", "quoted"]),
        ("dog’s ‘quoted’ “words”", ["dog's", "quoted", "words"]),
        ("<start> <end> <unk> <pad>", ["start", "end", "unk", "pad"]),
        ("No 7 bus, 50% off, 3.5 m", ["no", "7", "bus", "50", "off", "3", "5", "m"]),
        ("ÉCOLE École e\u0301cole", ["école", "école", "école"]),
        ("Straße ΟΔΟΣ İstanbul", ["straße", "οδος", "i\u0307stanbul"]),
        ("J\u030cahn \u01f0ahn", ["\u01f0ahn", "\u01f0ahn"]),
        ("a 👩\u200d👩\u200d👧 smiles 👍🏽", ["a", "smiles"]),
        ("כֶּלֶב רץ! \u200fكلب يجري،", ["כֶּלֶב", "רץ", "كلب", "يجري"]),
        ("两只狗。犬が走る", ["两只狗", "犬が走る"]),
        ("null\0byte\x1b", ["null", "byte"]),
        ("lone \ud800 surrogate", ["lone", "surrogate"]),
    ],
)
def test_words(caption, expected):
    assert words(caption) == [unicodedata.normalize("NFC", word) for word in expected]


@given(CAPTIONS)
def test_words_have_no_punctuation_and_splitting_again_changes_nothing(caption):
    found = words(caption)
    for word in found:
        assert word == word.strip("'")
        assert all(c in f"'{JOINERS}" or unicodedata.category(c)[0] in "LMN" for c in word)
    assert words(" ".join(found)) == found


@given(CAPTIONS)
def test_composed_and_decomposed_accents_give_the_same_words(caption):
    assert words(unicodedata.normalize("NFD", caption)) == words(caption)
