"""Words in scripts whose spelling needs joiners, combining marks or invisible characters."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.text.words import JOINERS, phrases, words

ZWNJ, ZWJ = JOINERS
# Letters, marks, joiners and invisible characters of many scripts, and what emoji sequences are made of.
_HARD = (
    "aAΣİ1'’ .-\u0301\u0308\u0338=Kİſ"
    "\u200b\u200c\u200d\u200e\u200f\u00ad\u034f\u061c\u2060\u2066\u2069\ufeff\ufe0f\u20e3\U000e0100\U000e0067"
    "بِمٌّ\u0640کلंकि्षരന്ാെกำ่ံ့្ខញุ"
    "\u1112\u1161\u11ab\u115f\u1160\u3164가각カ\u3099ー葛👩🏽🇩1#\u0f0bཀྲ\u0600\u06dd"
)
TEXT = st.text(_HARD, max_size=12) | st.text(max_size=12)


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(f"دایره{ZWNJ}ای", id="Persian"),
        pytest.param(f"می{ZWNJ}چرخد", id="Persian verb"),
        pytest.param("مُحَمَّدٌ", id="Arabic with diacritics"),
        pytest.param("كَلْبٌ", id="Arabic with sukun and tanwin"),
        pytest.param(f"क्{ZWJ}षेत्र", id="Hindi, half form"),
        pytest.param(f"क्{ZWNJ}ष", id="Hindi, visible virama"),
        pytest.param("ज़िन्दगी", id="Hindi, nukta"),
        pytest.param(f"അവന്{ZWJ}റെ", id="Malayalam, chillu inside"),
        pytest.param(f"മനുഷ്യന്{ZWJ}", id="Malayalam, chillu at the end"),
        pytest.param("മനുഷ്യൻ", id="Malayalam, atomic chillu"),
        pytest.param(f"ක්{ZWJ}ෂ", id="Sinhala"),
        pytest.param("สุนัขกำลังวิ่ง", id="Thai"),
        pytest.param("ខ្ញុំស្រលាញ់", id="Khmer"),
        pytest.param("မြန်မာ", id="Myanmar"),
        pytest.param("việt", id="Vietnamese"),
        pytest.param("כֶּלֶב", id="Hebrew with points"),
        pytest.param("한국어", id="Korean"),
        pytest.param("ㅋㅋ", id="Korean, compatibility jamo"),
        pytest.param("ガーデン", id="Japanese"),
        pytest.param("ᠮᠣᠩᠭᠣᠯ", id="Mongolian"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_word_stays_one_word(word, form):
    expected = unicodedata.normalize("NFC", word)
    given_ = unicodedata.normalize(form, word)
    assert words(given_) == [expected]
    assert words(f"«{given_}», {given_}.") == [expected, expected]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Donau\u00addampf\u00adschiff", ["donaudampfschiff"]),
        ("a\ufeffb c\u2060d e\u200ef g\u2066h\u2069 i\u061cj k\u034fl", ["ab", "cd", "ef", "gh", "ij", "kl"]),
        ("\ufeffA dog", ["a", "dog"]),
        ("ជា\u200bភាសា\u200bខ្មែរ", ["ជា", "ភាសា", "ខ្មែរ"]),
        ("e\u034f\u0301", ["é"]),
        ("葛\U000e0100城", ["葛城"]),
        (f"{ZWNJ}a{ZWNJ} {ZWJ}b{ZWJ} '{ZWNJ}c'{ZWJ}' {ZWJ} {ZWNJ}{ZWNJ}", ["a", "b", "c"]),
        (" \u0301a \u0301 \u0940 \u0e31 '\u0301 -\u0301b", ["a", "b"]),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8", ["한국"]),
        ("a\u3164b \u115f \u1160 \u3164", ["a", "b"]),
        ("Tie\u0302\u0301ng Vie\u0323\u0302t Đa\u0323i", ["tiếng", "việt", "đại"]),
        ("text\u0600١٢ \u06dd٣", ["text", "١٢", "٣"]),
        ("བཀྲ་ཤིས་བདེ་ལེགས།", ["བཀྲ", "ཤིས", "བདེ", "ལེགས"]),
    ],
)
def test_invisible_characters(caption, expected):
    assert words(caption) == expected


@pytest.mark.parametrize(
    ("emoji", "left"),
    [
        ("👨\u200d👩\u200d👧\u200d👦", []),
        ("👍🏽", []),
        ("👩🏽\u200d🚀", []),
        ("🏳️\u200d🌈", []),
        ("🇩🇪", []),
        ("🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", []),
        ("❤️", []),
        ("☺︎", []),
        ("#️⃣", []),
        ("*️⃣", []),
        ("1️⃣", ["1"]),
        ("2⃣", ["2"]),
    ],
)
def test_an_emoji_leaves_no_part_of_its_sequence(emoji, left):
    assert words(emoji) == left
    assert words(f"a {emoji} dog{emoji} runs") == ["a", *left, "dog" + "".join(left), "runs"]


@given(TEXT)
def test_a_word_has_a_visible_character_and_begins_with_it(caption):
    for word in [*words(caption), *phrases(caption)]:
        assert word.strip("'\u115f\u1160\u3164\uffa0")
        assert unicodedata.category(word[0])[0] in "LN"
        invisible = {c for c in word if unicodedata.category(c) == "Cf"}
        assert invisible <= set(JOINERS)


@given(TEXT)
def test_splitting_again_changes_nothing(caption):
    assert words(" ".join(words(caption))) == words(caption)
    assert phrases(" ".join(phrases(caption))) == phrases(caption)


@given(TEXT, st.sampled_from(["NFC", "NFD"]))
def test_composed_and_decomposed_text_give_the_same_words(caption, form):
    assert words(unicodedata.normalize(form, caption)) == words(caption)


@given(TEXT)
def test_invisible_characters_anywhere_change_no_word(caption):
    marked = "".join(f"{char}\u2060\u00ad" for char in caption)
    assert words(marked) == words("".join(f"{char}\ufe0f" for char in caption))
