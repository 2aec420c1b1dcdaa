"""Renewal: changed images are computed, the features of the others are kept, whatever happens in between."""

import contextlib

import numpy as np
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.features import extract, renewal
from flaxcap.features.shards import Row, Split, write_rows
from flaxcap.images.decode import ImageError

POSITIONS, WIDTH, SHARD = 2, 3, 4
BAD = 7  # an image that cannot be read


def write_split(path: epath.Path, images: list[int]) -> Split:
    """Writes a split whose image k has the digest "k"."""
    write_rows(path / "train", [Row(row, f"{row}.jpg", ("a",), str(image)) for row, image in enumerate(images)])
    split = Split(path / "train", len(images), SHARD)
    split.create_array(POSITIONS, WIDTH, "float32")
    return split


def run(path: epath.Path, split: Split, images: list[int], stop_at: int | None = None) -> list[int]:
    """Extracts the features and returns the images that were read; each feature is the image's number."""
    read = []

    def load(row: int) -> np.ndarray:
        if row == stop_at:
            raise KeyboardInterrupt
        read.append(images[row])
        if images[row] == BAD:
            raise ImageError("damaged")
        return np.full((1, 1, 3), images[row], np.uint8)

    def encode(images_IYX3: np.ndarray) -> np.ndarray:
        return np.broadcast_to(images_IYX3[:, :1, 0, :1], (len(images_IYX3), POSITIONS, WIDTH)).astype(np.float32)

    known = renewal.known_features(path, "train", split)
    array = split.create_array(POSITIONS, WIDTH, "float32")
    options = {"batch_size": 2, "at_once": 1, "num_workers": 1, "max_bad_fraction": 1.0, "name": "test"}
    extract.extract(split, array, load, encode, known=known, **options)
    return read


def renew(path: epath.Path, images: list[int]) -> Split:
    renewal.set_aside(path, "train")
    new = write_split(path, images)
    for old in renewal.old_splits(path, "train", SHARD):
        renewal.move_shards(old, new)
    return new


def check(split: Split, images: list[int]) -> None:
    again = Split(split.path, len(images), SHARD)
    assert again.unfinished() == []
    good = [row for row, image in enumerate(images) if image != BAD]
    assert again.present() == good
    if good:
        np.testing.assert_array_equal(again.read(good)[:, 0, 0], [images[row] for row in good])
    for number in again.finished():
        again.check_shard(number, lambda _: None)


numbers = st.lists(st.integers(0, 12), min_size=1, max_size=14)


@settings(max_examples=30, deadline=None)
@given(numbers, numbers)
def test_only_new_images_are_computed(tmp_path_factory, before, after):
    path = epath.Path(tmp_path_factory.mktemp("store"))
    run(path, write_split(path, before), before)
    new = renew(path, after)
    read = run(path, new, after)
    moved = [
        begin for begin in range(0, len(after), SHARD) if after[begin : begin + SHARD] == before[begin : begin + SHARD]
    ]
    tried = [image for row, image in enumerate(after) if row - row % SHARD not in moved]
    assert sorted(read) == sorted(image for image in tried if image not in before or image == BAD)
    renewal.clean_up(path, "train")
    check(new, after)
    assert [file.name for file in path.iterdir()] == ["train"]


@settings(max_examples=30, deadline=None)
@given(numbers, numbers, numbers, st.integers(0, 13))
def test_an_interrupted_renewal_resumes_also_with_other_images(tmp_path_factory, before, between, after, stop_at):
    path = epath.Path(tmp_path_factory.mktemp("store"))
    run(path, write_split(path, before), before)
    with contextlib.suppress(KeyboardInterrupt):
        run(path, renew(path, between), between, stop_at)
    new = renew(path, after)
    read = run(path, new, after)
    assert not set(read) & (set(before) - {BAD})
    check(new, after)


def test_one_replaced_image_is_the_only_one_computed(tmp_path):
    path, before = epath.Path(tmp_path), list(range(20, 32))
    run(path, write_split(path, before), before)
    untouched = (path / "train" / "features" / "c" / "2" / "0" / "0").read_bytes()
    after = [*before[:5], 99, *before[6:]]
    new = renew(path, after)
    assert new.unfinished() == [1]  # the other two shards have moved
    assert run(path, new, after) == [99]
    check(new, after)
    assert new.shard_file(2).read_bytes() == untouched
