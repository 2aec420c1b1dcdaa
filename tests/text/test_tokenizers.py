"""Vocabularies of characters and words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.errors import UserError
from flaxcap.text.vocabulary import END, SPECIAL, START, UNK, Vocabulary

CAPTIONS = ["一只狗在跑。", "两只 dogs 在草地上", "一只猫"]


def test_a_vocabulary_of_characters():
    vocabulary = Vocabulary.of_captions(CAPTIONS, 4, "characters")
    assert vocabulary.tokens == (*SPECIAL, "只", "一", "在", "dogs")
    ids = vocabulary.encode("一只 dogs 在跑", 50)
    assert ids == [START, *(vocabulary.ids[token] for token in ("一", "只", "dogs", "在")), UNK, END]
    assert vocabulary.decode(ids) == "一只dogs在<unk>"
    assert vocabulary.tokens_of(ids) == ["一", "只", "dogs", "在", "<unk>"]
    assert vocabulary.encode("一只dogs在跑", 5) == [*ids[:4], END]


def test_latin_words_stay_complete_and_separate():
    vocabulary = Vocabulary.of_captions(["A dog's ball, 狗"], 10, "characters")
    assert vocabulary.decode(vocabulary.encode("dog's a BALL", 50)) == "dog's a ball"


@given(st.lists(st.text("一只狗 a。กำ่สุ"), min_size=1))
def test_decoding_is_the_inverse_of_encoding(captions):
    vocabulary = Vocabulary.of_captions(["狗", *captions], 1000, "characters")
    for caption in captions:
        ids = vocabulary.encode(caption, 1000)
        assert UNK not in ids
        assert vocabulary.encode(vocabulary.decode(ids), 1000) == ids


def test_the_file_names_the_tokenizer():
    by_name = {name: Vocabulary([*SPECIAL, "▁", "狗"], name) for name in ("words", "characters", "bpe")}
    assert len({vocabulary.hash for vocabulary in by_name.values()}) == 3
    for name, vocabulary in by_name.items():
        found = Vocabulary.from_json(vocabulary.to_json(), "v.json")
        assert (found.tokenizer_name, found.hash) == (name, vocabulary.hash)


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="tokenizer: found 'letters', expected one of words, characters, bpe"):
        Vocabulary.of_captions(["a"], 5, "letters")
