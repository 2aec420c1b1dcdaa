"""Vocabularies: their words, token ids, and files."""

import collections
import itertools
import json
import time

import numpy as np
import pytest
from hard_captions import CAPTIONS
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.text.vocabulary import END, PAD, SPECIAL, START, UNK, Vocabulary, VocabularyError
from flaxcap.text.words import words


def test_the_most_frequent_words_are_kept_and_ties_are_alphabetical():
    captions = ["b a c", "c b", "C!", "z y a'", "é"]
    assert Vocabulary.of_captions(captions, 100).tokens == (*SPECIAL, "c", "a", "b", "y", "z", "é")
    assert Vocabulary.of_captions(captions, 2).tokens == (*SPECIAL, "c", "a")
    assert Vocabulary.of_captions(iter(captions), 1).tokens == (*SPECIAL, "c")


@given(st.lists(st.text("abcd '"), min_size=1), st.integers(1, 6), st.randoms())
def test_a_vocabulary_depends_on_counts_alone(captions, size, random):
    counts = collections.Counter(word for caption in captions for word in words(caption))
    if not counts:
        with pytest.raises(VocabularyError, match="no word"):
            Vocabulary.of_captions(captions, size)
        return
    vocabulary = Vocabulary.of_captions(captions, size)
    kept = vocabulary.tokens[len(SPECIAL) :]
    assert len(kept) == min(size, len(counts))
    assert all((-counts[a], a) < (-counts[b], b) for a, b in itertools.pairwise(kept))
    assert all((-counts[kept[-1]], kept[-1]) < (-counts[word], word) for word in set(counts) - set(kept))
    shuffled = random.sample(captions, len(captions))
    assert Vocabulary.of_captions(shuffled, size).tokens == vocabulary.tokens


def test_encode():
    vocabulary = Vocabulary.of_captions(["a dog sees a cat"], 100)
    a, cat, dog = (vocabulary.ids[w] for w in ("a", "cat", "dog"))
    assert vocabulary.encode("A dog, a cat!", 50) == [START, a, dog, a, cat, END]
    assert vocabulary.encode("an ox and a dog", 50) == [START, UNK, UNK, UNK, a, dog, END]
    assert vocabulary.encode("no known word", 50) == [START, UNK, UNK, UNK, END]
    assert vocabulary.encode("?!", 50) == [START, END]
    assert vocabulary.encode("<pad> <end>", 50) == [START, UNK, UNK, END]
    assert vocabulary.encode("a dog a cat", 6) == [START, a, dog, a, cat, END]
    assert vocabulary.encode("a dog a cat", 5) == [START, a, dog, a, END]
    assert vocabulary.encode("a dog a cat", 3) == [START, a, END]


def test_decode():
    vocabulary = Vocabulary.of_captions(["a dog"], 100)
    a, dog = vocabulary.ids["a"], vocabulary.ids["dog"]
    assert vocabulary.decode([START, a, dog, END, dog, dog]) == "a dog"
    assert vocabulary.decode(np.array([a, UNK, PAD, PAD], np.int32)) == "a <unk>"
    assert vocabulary.decode([END]) == vocabulary.decode([]) == ""


@given(st.lists(CAPTIONS, min_size=1), st.integers(3, 20))
def test_decoding_is_the_inverse_of_encoding(captions, max_length):
    known = ["known", *captions]
    vocabulary = Vocabulary.of_captions(known, 10_000)
    for caption in known:
        ids = vocabulary.encode(caption, max_length)
        assert len(ids) <= max_length
        assert ids[0] == START
        assert ids[-1] == END
        assert not {PAD, UNK, START, END} & set(ids[1:-1])
        text = vocabulary.decode(ids)
        assert text.split() == words(caption)[: max_length - 2]
        assert vocabulary.encode(text, max_length) == ids


def test_a_caption_of_100_000_characters_is_encoded_fast():
    vocabulary = Vocabulary.of_captions(["dog"], 10)
    begin = time.perf_counter()
    for caption in ("dog " * 25_000, "x" * 100_000, "👍" * 100_000, "e\u0301" * 50_000, "'" * 100_000):
        assert vocabulary.encode(caption, 50)[-1] == END
        assert len(vocabulary.encode(caption, 50)) <= 50
    assert time.perf_counter() - begin < 5


@given(st.lists(CAPTIONS, min_size=1).filter(lambda c: any(map(words, c))))
def test_json_round_trip(captions):
    vocabulary = Vocabulary.of_captions(captions, 1000)
    saved = vocabulary.to_json()
    assert saved.encode().decode() == saved
    found = Vocabulary.from_json(saved, "vocabulary.json")
    assert found.tokens == vocabulary.tokens
    assert found.hash == json.loads(saved)["hash"] == vocabulary.hash


def test_the_hash_depends_on_words_and_their_order():
    orders = [["a", "b"], ["b", "a"], ["ab"], ["a"], ["a", "c"]]
    assert len({Vocabulary([*SPECIAL, *order]).hash for order in orders}) == len(orders)


def damaged(**changes) -> str:
    return json.dumps(json.loads(Vocabulary.of_captions(["a dog"], 10).to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        (damaged()[:-10], "line 1"),
        ("[" * 100_000, "recursion"),
        ("null", "NoneType"),
        ("[]", "list"),
        ("{}", "found no 'tokens'"),
        (json.dumps({"tokens": [*SPECIAL, "a"]}), "found no 'tokenizer'"),
        (json.dumps({"tokens": [*SPECIAL, "a"], "tokenizer": "words"}), "found no 'hash'"),
        (damaged(tokenizer="characters"), "do not match their hash"),
        (damaged(tokenizer="syllables"), "found 'syllables', expected one of words, characters, bpe"),
        (damaged(tokenizer=["bpe"]), r"found \['bpe'\], expected one of"),
        (damaged(tokens=[*SPECIAL, "a", "cat"]), "do not match their hash"),
        (damaged(tokens=[*SPECIAL, "dog", "a"]), "do not match their hash"),
        (damaged(tokens=[*SPECIAL, "a", "a"]), "repeats no word"),
        (damaged(tokens=["a", "dog"]), "starts with <pad>"),
        (damaged(tokens="a dog"), "starts with <pad>"),
        (damaged(tokens=[*SPECIAL, 1]), "str"),
        (damaged(tokens=[*SPECIAL, ["a"]]), "unhashable"),
        (damaged(tokens=[*SPECIAL, "\ud800"]), "surrogates"),
        (damaged(tokens=7), "not iterable"),
        (damaged(hash=None), "do not match their hash"),
    ],
)
def test_the_error_of_a_damaged_file_names_it(text, reason):
    with pytest.raises(VocabularyError, match=rf"^some/vocabulary\.json: not a vocabulary: .*{reason}"):
        Vocabulary.from_json(text, "some/vocabulary.json")
