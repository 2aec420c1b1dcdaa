"""Byte pair encoding: pieces learned by sentencepiece, merged without it."""

import io
import random
import sys
import time

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.text import bpe
from flaxcap.text.vocabulary import END, SPECIAL, START, UNK, Vocabulary, VocabularyError

ENGLISH = [
    "A dog runs.",
    "Two dogs run fast",
    "the dogs are running",
    "a runner runs faster",
    "fast dog, faster dogs",
] * 3
CHINESE = [
    "灰色背景上有一个红色的圆形。",
    "灰色背景上有一个蓝色的方块。",
    "画面，能看到红色圆形",
    "画面里能看到绿色圆形",
] * 3


@pytest.mark.parametrize("captions", [ENGLISH, CHINESE])
def test_pieces_depend_on_the_captions_and_not_on_their_order(captions):
    pieces = bpe.learn(captions, 40)
    assert len(pieces) == len(set(pieces)) <= 40
    shuffled = random.Random(0).sample(captions, len(captions))
    assert bpe.learn(shuffled, 40) == pieces
    assert set("".join(bpe.marked_words(captions[0]))) <= set(pieces)


def test_every_piece_is_made_at_least_twice_in_the_training_captions():
    pieces = bpe.learn(["a dog runs", "a dog sleeps", "the cat"], 1000)
    assert {"▁a", "▁dog", "dog"} <= set(pieces)
    assert not {"▁runs", "▁sleeps", "▁cat", "▁the"} & set(pieces)


@pytest.mark.parametrize(("size", "expected"), [(3, ["a", "d", "▁"]), (1, ["a"])])
def test_a_small_size_keeps_the_most_frequent_characters(size, expected):
    assert bpe.learn(["a dada"], size) == expected


@pytest.mark.parametrize("captions", [ENGLISH, CHINESE])
def test_merging_equals_sentencepiece(captions):
    """sentencepiece encodes by the same model, with all its pieces."""
    model = io.BytesIO()
    words = [word for caption in captions for word in bpe.marked_words(caption)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(word[1:] for word in words), model_writer=model, model_type="bpe", vocab_size=70,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    merger = bpe.Merger([theirs.id_to_piece(n) for n in range(3, theirs.get_piece_size())])
    characters = sorted(set("".join(words)) - {"▁"})
    some = random.Random(0)
    for word in [*words, *("▁" + "".join(some.choices(characters, k=some.randint(1, 20))) for _ in range(300))]:
        assert list(merger(word)) == theirs.encode(word[1:], out_type=str)


@pytest.mark.parametrize("captions", [ENGLISH, CHINESE, ["A 犬が走る 2 dogs run", "สุนัข dogs"]])
def test_decoding_is_the_inverse_of_encoding(captions):
    vocabulary = Vocabulary.of_captions(captions, 60, "bpe")
    for caption in captions:
        ids = vocabulary.encode(caption, 100)
        assert (ids[0], ids[-1]) == (START, END)
        assert UNK not in ids
        text = vocabulary.decode(ids)
        assert text == " ".join(word[1:] for word in bpe.marked_words(caption))
        assert vocabulary.encode(text, 100) == ids
    assert Vocabulary.of_captions(CHINESE, 60, "bpe").decode(ids[:0]) == ""


def test_text_has_the_spacing_of_its_language():
    chinese = Vocabulary.of_captions(CHINESE, 60, "bpe")
    assert chinese.decode(chinese.encode("灰色，背景。红色", 50)) == "灰色背景红色"
    english = Vocabulary.of_captions(ENGLISH, 60, "bpe")
    assert english.decode(english.encode("Dogs... run!", 50)) == "dogs run"
    assert english.decode([english.ids["▁"], english.ids["▁"], english.ids["▁dog"]]) == "dog"


def test_an_unknown_character_is_unknown_alone():
    vocabulary = Vocabulary.of_captions(ENGLISH, 60, "bpe")
    ids = vocabulary.encode("dogs ж", 50)
    assert ids.count(UNK) == 1
    assert vocabulary.decode(ids) == "dogs <unk>"


@given(st.lists(st.text("ab c灰色", max_size=8), min_size=1, max_size=5))
def test_the_file_holds_the_complete_tokenizer(captions):
    vocabulary = Vocabulary.of_captions(["ab abc", "灰色", *captions], 20, "bpe")
    found = Vocabulary.from_json(vocabulary.to_json(), "vocabulary.json")
    assert (found.tokenizer_name, found.hash) == ("bpe", vocabulary.hash)
    for caption in captions:
        assert found.encode(caption, 50) == vocabulary.encode(caption, 50)
    assert Vocabulary(vocabulary.tokens, "words").hash != vocabulary.hash


def test_the_model_needs_no_sentencepiece_but_learning_names_the_extra(monkeypatch):
    saved = Vocabulary.of_captions(ENGLISH, 60, "bpe").to_json()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    vocabulary = Vocabulary.from_json(saved, "vocabulary.json")
    assert vocabulary.decode(vocabulary.encode("a dog runs", 50)) == "a dog runs"
    with pytest.raises(bpe.MissingBpeError, match=r'^--config\.data\.tokenizer=bpe: .*`pip install "flaxcap\[bpe\]"`'):
        Vocabulary.of_captions(ENGLISH, 60, "bpe")


def test_captions_without_a_word_are_refused():
    with pytest.raises(VocabularyError, match="contain no word"):
        Vocabulary.of_captions(["?!"], 60, "bpe")


def test_a_caption_of_100_000_characters_is_encoded_fast():
    pieces = ["aa", "aaaa", "灰色", "a", "灰", "色", "▁"]
    vocabulary = Vocabulary([*SPECIAL, *pieces], "bpe")
    begin = time.perf_counter()
    for caption in ("a" * 100_000, "灰色" * 50_000, "a " * 50_000):
        assert vocabulary.encode(caption, 50)[-1] == END
    assert time.perf_counter() - begin < 5


def test_a_word_has_one_token_if_it_is_a_piece():
    vocabulary = Vocabulary([*SPECIAL, "▁dog", "dog", "cat"], "bpe")
    assert vocabulary.id_of_word("dog") == 4
    assert vocabulary.id_of_word("cat") is None
    assert Vocabulary([*SPECIAL, "dog"]).id_of_word("dog") == 4
