"""Characters and spacing of scripts that are written without spaces between words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.text.scripts import by_character, is_spaceless, join, split, written_without_spaces


@pytest.mark.parametrize(
    ("caption", "units", "text"),
    [
        ("灰色背景。", ["灰", "色", "背", "景"], "灰色背景"),
        ("2019年的Dog, 跑", ["2019", "年", "的", "dog", "跑"], "2019年的dog跑"),
        ("犬がワンワン！走る々", [*"犬がワンワン走る々"], "犬がワンワン走る々"),
        ("か\u3099ﾊﾞー", ["が", "ﾊﾞ", "ー"], "がﾊﾞー"),
        ("น้ำตก กำลัง", ["น้ำ", "ต", "ก", "กำ", "ลั", "ง"], "น้ำตกกำลัง"),
        ("ໝາ ນຳ້", ["ໝ", "າ", "ນຳ້"], "ໝານຳ້"),
        ("ខ្ញុំស្រលាញ់", ["ខ្ញុំ", "ស្រ", "លា", "ញ់"], "ខ្ញុំស្រលាញ់"),
        ("ကျွန်ုပ်။ မြန်မာ", ["ကျွ", "န်ု", "ပ်", "မြ", "န်", "မာ"], "ကျွန်ုပ်မြန်မာ"),
        ("တက္ကသိုလ်", ["တ", "က္က", "သို", "လ်"], "တက္ကသိုလ်"),
        ("བཀྲ་ཤིས། བདེ", ["བ", "ཀྲ", "་", "ཤི", "ས", "་", "བ", "དེ"], "བཀྲ་ཤིས་བདེ"),
        ("A dog's ball", ["a", "dog's", "ball"], "a dog's ball"),
        ("دایره\u200cای می\u200cچرخد", ["دایره\u200cای", "می\u200cچرخد"], "دایره\u200cای می\u200cچرخد"),
        ("क्षेत्र में", ["क्षेत्र", "में"], "क्षेत्र में"),
        ("개가 뛴다", ["개가", "뛴다"], "개가 뛴다"),
        ("?!", [], ""),
    ],
)
def test_units_and_their_text(caption, units, text):
    assert split(caption) == units
    assert join(units) == text
    assert split(text) == units
    assert by_character(caption) == [unit for unit in units if unit != "་"]


PIECES = ["灰", "が", "カ", "กำ", "สุ", "ខ្ញុំ", "န်", "a", "é", "dog's", "한", "1", " ", "-", "。", "\u200b"]


@given(st.text("กำ่ស្រမ္က犬a '་") | st.text())
def test_splitting_the_text_again_changes_nothing(caption):
    assert split(join(split(caption))) == split(caption)


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_space_stands_beside_a_character_and_nothing_is_lost(caption):
    units = split(caption)
    text = join(units)
    assert text.replace(" ", "") == "".join(units)
    for before, _, after in (text[n - 1 : n + 2] for n, char in enumerate(text) if char == " "):
        assert not is_spaceless(before)
        assert not is_spaceless(after)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["灰色背景"], True),
        (["一 只 狗 在 跑"], True),
        (["สุนัข 2 ตัว"], True),
        (["犬 runs"], False),
        (["一只dog"], True),
        (["a dog runs", "两只狗"], False),
        (["개가 뛴다", "пёс"], False),
        (["मैं"], False),
        (["?!", ""], False),
        ([], False),
    ],
)
def test_most_of_the_text_decides(captions, expected):
    assert written_without_spaces(iter(captions)) == expected
