"""A split that repeats another one is named in one line."""

import pytest

from flaxcap.features import overlap
from flaxcap.features.shards import Row

CAPTIONS = [(f"a photograph of {n} things", "another sentence") for n in range(8)]


def rows(names: list[str], first: int = 0) -> list[Row]:
    return [Row(number, name, CAPTIONS[number % 8]) for number, name in enumerate(names, first)]


TRAIN = rows(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])


@pytest.mark.parametrize(
    ("val", "line"),
    [
        (TRAIN, "val: 4 of its 4 images are in train too; the first is 'a.jpg'; "),
        (rows(["x.jpg", "b.jpg"], 5), "val: 1 of its 2 images are in train too; the first is 'b.jpg'; "),
        (rows(["val/a.jpg", "val/b.jpg"]), "val: 2 of its 2 images are in train too; the first is 'val/a.jpg'; "),
        (rows(["p.jpg", "q.jpg", "r.jpg", "s.jpg"]), "val: its captions are those of train; "),
    ],
)
def test_a_repeated_split_is_named(val, line):
    (found,) = overlap.lines({"train": TRAIN, "val": val})
    assert found == f"{line}its scores do not tell how new images are captioned"


def test_a_split_is_compared_with_every_one_before_it():
    val = rows(["v.jpg", "w.jpg"], 4)
    found = overlap.lines({"train": TRAIN, "val": val, "test": val})
    assert [line.partition(";")[0] for line in found] == ["test: 2 of its 2 images are in val too"]


def test_short_captions_that_are_equal_by_chance_are_no_repetition():
    some = {
        "train": [Row(0, "train/1.jpg", ("a dog",)), Row(1, "train/2.jpg", ("a cat",))],
        "val": [Row(2, "val/1.jpg", ("a dog",)), Row(3, "val/2.jpg", ("a cat",))],
        "test": rows(["a.jpg"], 3),
    }
    assert overlap.lines(some) == []
