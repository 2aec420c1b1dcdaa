"""The caption-health report, compared with numbers counted by hand."""

import pytest

from flaxcap.errors import UserError
from flaxcap.metrics.diagnostics import health
from flaxcap.metrics.units import CHARACTERS
from flaxcap.text.vocabulary import SPECIAL, Vocabulary

REFERENCES = [["A dog leaps.", "Dogs leap far!"], ["the cat sleeps on"]]
VOCABULARY = Vocabulary([*SPECIAL, "a", "dog", "on", "cat", "the", "runs", "very", "sleeps"])


def report(*captions: str) -> dict[str, float]:
    return health(captions, REFERENCES, VOCABULARY)


def test_a_complete_report():
    assert report("A dog on the", "a dog on the", "the cat cat sleeps.", "") == {
        "empty": 1 / 4,
        "function_word_end": 2 / 4,
        "unique": 3 / 4,
        "words_used": 6,
        "vocabulary_used": 6 / 8,
        "repeats_1": 1 / 4,
        "repeats_2": 0,
        "repeats_3": 0,
        "repeats_4": 0,
        "length": 12 / 4,
        "reference_length": 10 / 3,
    }


@pytest.mark.parametrize(
    ("caption", "repeats"),
    [
        ("a dog and a cat", [0, 0, 0, 0]),
        ("a dog dog runs", [1, 0, 0, 0]),
        ("a dog and a dog", [0, 1, 0, 0]),
        ("on on on", [1, 1, 0, 0]),
        ("a dog runs and a dog runs", [0, 1, 1, 0]),
        ("a dog runs on a dog runs on", [0, 1, 1, 1]),
        ("a", [0, 0, 0, 0]),
    ],
)
def test_repeats(caption, repeats):
    found = report(caption)
    assert [found[f"repeats_{n}"] for n in (1, 2, 3, 4)] == repeats


def test_words_outside_the_vocabulary_count_as_words_used_only():
    found = report("zebra zebra a")
    assert found["words_used"] == 2
    assert found["vocabulary_used"] == 1 / 8


@pytest.mark.parametrize("end", ["a", "the", "of", "with", "in", "on", "and"])
def test_captions_that_end_in_a_function_word(end):
    assert report(f"a dog {end}.")["function_word_end"] == 1
    assert report(f"a dog {end} runs.")["function_word_end"] == 0


def test_characters_take_the_place_of_words():
    vocabulary = Vocabulary([*SPECIAL, *"一只狗猫跑看"], "characters")
    found = health(["一只狗狗跑", "猫跑dog"], [["一只狗。"], ["两只猫在 park"]], vocabulary, CHARACTERS)
    assert found["words_used"] == 6
    assert found["vocabulary_used"] == 5 / 6
    assert found["repeats_1"] == 1 / 2
    assert (found["length"], found["reference_length"]) == (8 / 2, 8 / 2)


def test_the_share_of_the_vocabulary_counts_its_tokens():
    vocabulary = Vocabulary([*SPECIAL, "do", "▁do", *"▁dogs"], "bpe")
    assert health(["Dog"], [["a dog"]], vocabulary)["vocabulary_used"] == 2 / 7


def test_all_values_are_floats():
    assert all(isinstance(value, float) for value in report("a dog").values())


@pytest.mark.parametrize(
    ("captions", "references", "vocabulary"), [([], [["a"]], ["a"]), (["a"], [[]], ["a"]), (["a"], [["a"]], [])]
)
def test_an_empty_input_is_refused(captions, references, vocabulary):
    message = r"found \d captions, \d references, \d vocabulary words, expected at least one of each"
    with pytest.raises(UserError, match=message):
        health(captions, references, Vocabulary([*SPECIAL, *vocabulary]))
