"""Scores per character in languages without spaces between words."""

import pytest

from flaxcap.metrics import scorer
from flaxcap.metrics.scorer import Scorer
from flaxcap.metrics.units import CHARACTERS, WORDS, unit_of

CHINESE = [["一只狗在跑。", "狗在草地上跑"], ["两只猫睡觉", "猫在睡觉"], ["一个人骑车", "有人骑自行车"]]
THAI = [["สุนัขกำลังวิ่ง"], ["แมวกำลังนอน"], ["คนขี่จักรยาน"]]
# One letter for each character of CHINESE: its scores by word are those of CHINESE by character.
CHARACTERS_SEEN = sorted({char for some in CHINESE for text in some for char in text})
LETTERS = {char: f"{chr(97 + n // 26)}{chr(97 + n % 26)}z" for n, char in enumerate(CHARACTERS_SEEN)}


def spelt(text: str) -> str:
    return " ".join(LETTERS[char] for char in text if char != "。")


@pytest.mark.parametrize(
    ("references", "unit"),
    [
        (CHINESE, CHARACTERS),
        (THAI, CHARACTERS),
        ([["一 只 狗"]], CHARACTERS),
        ([["a dog runs"], ["a 狗"]], WORDS),
        ([["개가 뛴다"], ["बिल्ली"]], WORDS),
        ([["?"]], WORDS),
    ],
)
def test_the_references_decide(references, unit):
    assert unit_of(references) is unit
    assert Scorer(references).unit is unit


def test_each_character_counts_as_a_word():
    candidates = ["狗在跑", "猫在草地上睡觉", "有人骑车"]
    found = scorer.score(candidates, CHINESE)
    expected = scorer.score([*map(spelt, candidates)], [[*map(spelt, some)] for some in CHINESE])
    assert found == pytest.approx(expected)
    assert found["CIDEr"] > 0.5
    assert found["Bleu_1"] > 0.5


def test_punctuation_and_spaces_change_no_score_by_character():
    assert scorer.score(["狗 在，跑！", "猫 睡觉。", "人骑车"], CHINESE) == scorer.score(
        ["狗在跑", "猫睡觉", "人骑车"], CHINESE
    )


def test_a_thai_mark_counts_with_its_letter():
    assert CHARACTERS.tokenize("กำลังวิ่ง A dog") == ["กำ", "ลั", "ง", "วิ่", "ง", "a", "dog"]
    perfect = scorer.score([some[0] for some in THAI], THAI)
    assert perfect["CIDEr"] == pytest.approx(10)
    assert perfect["Bleu_4"] == pytest.approx(1)
