"""The warnings about a data set's captions."""

import pytest

from flaxcap.text.report import warnings
from flaxcap.text.vocabulary import Vocabulary


def lines(train: list[str], val: list[str], tokenizer: str = "words", max_length: int = 50, **others) -> list[str]:
    captions = {"train": train, "val": val} | others
    named = {role: [(f"{role}{n}.jpg", text) for n, text in enumerate(some)] for role, some in captions.items()}
    return list(warnings(named, Vocabulary.of_captions(train, 1000, tokenizer), max_length))


def test_no_fault_no_line():
    assert lines(["a dog runs", "a cat"], ["a dog", "a cat runs"], max_length=5) == []
    assert lines(["一只狗"], ["狗一只"], "characters") == []


def test_the_share_of_unknown_validation_words():
    assert lines(["a dog runs fast"], ["a dog runs fast", "a dog runs slowly"]) == [
        "val: 1 of 8 (12.5%) words are not in the vocabulary"
    ]
    assert lines(["a dog " * 100], ["a dog " * 3000 + "cat"], max_length=202) == [
        "val: 1 of 6001 (<0.1%) words are not in the vocabulary"
    ]
    assert lines(["a dog"], ["un chien", "a dog"]) == [
        "val: 2 of 4 (50%) words are not in the vocabulary, which has 2: see --config.data.vocab_size and the languages"
        " of both splits"
    ]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (["灰色背景上有一个红色的圆形。"], ["灰色背景上有一个蓝色的圆形。"]),
        (["犬が草の上を走っている"], ["猫が草の上を走っている"]),
        (["สุนัขกำลังวิ่งบนหญ้า"], ["แมวกำลังวิ่งบนหญ้า"]),
        (["ឆ្កែកំពុងរត់លើស្មៅ"], ["ឆ្មាកំពុងរត់លើស្មៅ"]),
        (["ໝາກຳລັງແລ່ນ"], ["ແມວກຳລັງແລ່ນ"]),
        (["ခွေးပြေးနေသည်"], ["ကြောင်ပြေးနေသည်"]),
    ],
)
def test_a_language_without_spaces_is_recognised(train, val):
    assert lines(train, val) == [
        "val: 1 of 1 (100%) words are not in the vocabulary: the captions have no spaces between words; use"
        " --config.data.tokenizer=characters"
    ]
    assert lines(train, train) == [
        f"val: words have {len(train[0].rstrip('。'))} characters on average: the captions have no spaces between"
        " words; use --config.data.tokenizer=characters"
    ]
    assert not any("tokenizer" in line for line in lines(train, val, "characters"))


def test_separated_words_of_such_a_language_are_words():
    assert lines(["一 只 狗 在 跑"], ["一 只 狗 在 跑"]) == []
    assert lines(["一 只 狗 在 跑"], ["一 只 猫 在 跑 一"]) == ["val: 1 of 6 (16.7%) words are not in the vocabulary"]


def test_the_share_of_cut_training_captions():
    assert lines(["a dog runs", "a dog", "a", "a dog runs a dog"], ["a"], max_length=4) == [
        "train: 2 of 4 (50%) captions are cut: they have more tokens than --config.data.max_length=4; the longest has 7"
    ]
    assert lines(["一只狗"], ["狗"], "characters", max_length=4)[0].startswith("train: 1 of 1 (100%) captions are cut")


def test_captions_without_a_word_are_named_by_split():
    found = lines(["a", "?!", "🙂", "a dog"], ["...", "a"], test=["a", " "])
    assert found == [
        "train: 2 of 4 (50%) captions contain no word, only punctuation or symbols; the first is '?!', of 'train1.jpg'",
        "val: 1 of 2 (50%) captions contain no word, only punctuation or symbols; the first is '...', of 'val0.jpg'",
        "test: 1 of 2 (50%) captions contain no word, only punctuation or symbols; the first is ' ', of 'test1.jpg'",
    ]


def test_a_name_cannot_write_to_the_terminal():
    (line,) = warnings(
        {"train": [("a.jpg", "a")], "val": [("\x1b[2J", "?"), ("b", "a")]}, Vocabulary.of_captions("a", 1), 9
    )
    assert "\x1b" not in line
