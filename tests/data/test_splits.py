"""Names of splits, and splits by a hash of names."""

import itertools

import pytest

from flaxcap.data import splits
from flaxcap.data.splits import split_by_name


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "Train", "TRAINING", " train "]),
        ("val", ["val", "valid", "Validation", "dev", "DEV", "development"]),
        ("test", ["test", "TEST", "Testing"]),
        ("restval", ["restval", "RestVal"]),
    ],
)
def test_usual_spellings_become_one_name(split, names):
    assert {splits.normalised(name) for name in names} == {split}


@pytest.mark.parametrize("name", ["minival", "train_small", "eval", "Fold1"])
def test_other_names_stay_as_they_are(name):
    assert splits.normalised(name) == name
    assert splits.is_possible(name)


@pytest.mark.parametrize("name", ["", "all", "../up", "1st", "a b", "x" * 65])
def test_names_that_tfds_does_not_take(name):
    assert not splits.is_possible(splits.normalised(name))


@pytest.mark.parametrize(
    ("stem", "found"),
    [
        ("captions_train2014", ("train2014", "captions_2014")),
        ("val", ("val", "")),
        ("Validation-captions", ("Validation", "-captions")),
        ("captions_trainval2014", None),
        ("train_test_split", None),
        ("captions", None),
    ],
)
def test_the_split_in_the_name_of_a_file(stem, found):
    assert splits.of_words(stem) == found


def test_split_by_name_is_stable_and_never_lacks_train_or_val():
    names = [f"{k}.jpg" for k in range(2000)]
    splits = split_by_name(names)
    assert sorted(itertools.chain(*splits.values())) == sorted(names)
    assert len(splits["train"]) == pytest.approx(1800, abs=50)
    assert len(splits["val"]) == pytest.approx(100, abs=35)
    assert split_by_name(names[::-1])["val"] == splits["val"][::-1]
    fewer = split_by_name(names[:1000])
    for split, members in fewer.items():
        assert members == [name for name in splits[split] if name in set(names[:1000])]
    for first in range(300):
        for count in (2, 3, 5):
            small = split_by_name(names[first : first + count])
            assert small["train"]
            assert small["val"]
    assert split_by_name(splits["test"][:1]) == {"train": splits["test"][:1], "val": [], "test": []}
