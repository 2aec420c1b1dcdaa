"""Hints at the nearest name, and text that is safe to print."""

import pytest

from flaxcap.config import Config
from flaxcap.errors import cut, listed, nearest, plain, quoted, shown
from flaxcap.fields import flatten


def test_nearest_offers_only_the_names_that_it_is_given():
    assert nearest("trian", ["prepare", "train"]) == "; did you mean 'train'?"
    assert nearest("train", []) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.epoch", "; did you mean 'train.epochs'?"),
        ("epochs", "; did you mean 'train.epochs'?"),
        ("model.epochs", "; did you mean 'train.epochs'?"),
        ("hiden_dim", "; did you mean 'model.hidden_dim'?"),
        ("d", "; did you mean 'dataset'?"),
        ("zzzzzz", ""),
        ("", ""),
    ],
)
def test_nearest(name, expected):
    assert nearest(name, flatten(Config())) == expected


def test_untrusted_text_is_printed_in_one_line():
    assert plain("a\x1b[2Jb\nc\u202ed\ud800") == "a\\x1b[2Jb\\nc\\u202ed\\ud800"
    assert shown({"a": "\r"}) == '{"a": "\\r"}'
    assert quoted("\u2028") == "'\\u2028'"
    assert listed(["a", 1]) == "'a', 1"
    assert cut("x" * 81) == "x" * 77 + "..."
    assert cut("x" * 80) == "x" * 80


def test_values_that_nest_too_deeply_are_described():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == quoted(deep) == "a list that is too deep to show"
