"""Extraction: features land in their rows, bad images are skipped, unfinished shards are resumed."""

import json
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.features import extract
from flaxcap.features.shards import Row, Skipped, Split, StoreError, write_rows
from flaxcap.images.decode import ImageError

POSITIONS, WIDTH = 5, 2


def make_split(path, images: int, shard_rows: int) -> Split:
    path = epath.Path(path)
    write_rows(path, [Row(k, f"{k}.jpg", ("a",)) for k in range(images)])
    return Split(path, images, shard_rows)


def pixels(row: int) -> np.ndarray:
    return np.full((2, 2, 3), row, np.uint8)


def encode(images: np.ndarray) -> np.ndarray:
    """Stands in for the network: every feature is the value of the image's pixels."""
    return np.broadcast_to(images[:, :1, 0, :1], (len(images), POSITIONS, WIDTH)).astype(np.float32)


def run(split: Split, load: Callable = pixels, encode: Callable = encode, **options) -> None:
    settings = {"batch_size": 4, "at_once": 2, "num_workers": 2, "max_bad_fraction": 1.0} | options
    array = split.create_array(POSITIONS, WIDTH, "float32")
    extract.extract(split, array, load, encode, name="test", **settings)


def bad_at(*rows: int) -> Callable[[int], np.ndarray]:
    def load(row: int) -> np.ndarray:
        if row in rows:
            raise ImageError(f"damaged at row {row}")
        return pixels(row)

    return load


def check(split: Split, bad: set[int] | frozenset[int] = frozenset()) -> None:
    """Asserts that each row has its own features, and the bad rows none."""
    again = Split(split.path, split.images, split.shard_rows)
    assert again.unfinished() == []
    good = [row for row in range(split.images) if row not in bad]
    if good:
        np.testing.assert_array_equal(again.read(good)[:, 0, 0], good)
    for row in bad:
        with pytest.raises(StoreError, match=f"row {row} holds no features"):
            again.read([row])
    assert [(s.row, s.filename) for s in again.skipped()] == [(row, f"{row}.jpg") for row in sorted(bad)]


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.data())
def test_every_feature_lands_in_its_own_row(
    tmp_path_factory, images, shard_rows, batch_size, at_once, num_workers, data
):
    bad = data.draw(st.sets(st.integers(0, images - 1)))
    sizes = set()

    def counted(images_IYX3):
        sizes.add(images_IYX3.shape)
        return encode(images_IYX3)

    split = make_split(tmp_path_factory.mktemp("split"), images, shard_rows)
    run(split, bad_at(*bad), counted, batch_size=batch_size, at_once=at_once, num_workers=num_workers)
    check(split, bad)
    assert sizes <= {(batch_size, 2, 2, 3)}  # the last batch too has the shape that was compiled


def test_images_loaded_out_of_order_land_in_their_rows(tmp_path):
    def load(row: int) -> np.ndarray:
        time.sleep(0.02 if row % 3 == 0 else 0)
        return pixels(row)

    split = make_split(tmp_path, 20, 7)
    run(split, load, num_workers=4)
    check(split)


def test_a_bounded_number_of_images_is_loaded_ahead(tmp_path):
    loaded, ahead, one = [], [], threading.Lock()

    def load(row: int) -> np.ndarray:
        loaded.append(row)
        return pixels(row)

    def slow(images_IYX3: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        with one:
            ahead.append(len(loaded) - 4 * len(ahead))
        return encode(images_IYX3)

    split = make_split(tmp_path, 100, 100)
    run(split, load, slow, batch_size=4, num_workers=2)
    check(split)
    assert sorted(loaded) == list(range(100))
    assert 4 < max(ahead) <= 4 + 4 * 4 + 1


def test_workers_load_concurrently(tmp_path):
    together = threading.Barrier(3, timeout=20)

    def load(row: int) -> np.ndarray:
        together.wait()
        return pixels(row)

    split = make_split(tmp_path, 6, 6)
    run(split, load, num_workers=3)
    check(split)


@pytest.mark.parametrize("at_once", [1, 3])
def test_batches_are_encoded_concurrently(tmp_path, at_once):
    together, under_way, one = threading.Barrier(at_once, timeout=20), [0], threading.Lock()

    def meeting(images_IYX3: np.ndarray) -> np.ndarray:
        with one:
            under_way.append(under_way[-1] + 1)
        together.wait()
        with one:
            under_way.append(under_way[-1] - 1)
        return encode(images_IYX3)

    split = make_split(tmp_path, 24, 24)
    run(split, encode=meeting, batch_size=2, at_once=at_once)
    check(split)
    assert max(under_way) == at_once


def test_an_error_of_the_network_ends_extraction(tmp_path):
    def broken(images_IYX3: np.ndarray) -> np.ndarray:
        if images_IYX3.max() > 4:
            raise MemoryError("the device is full")
        return encode(images_IYX3)

    split = make_split(tmp_path, 30, 4)
    with pytest.raises(MemoryError, match="the device is full"):
        run(split, encode=broken)
    assert split.unfinished()[0] == 1


def test_bad_images_are_skipped_and_listed_with_reasons(tmp_path, caplog):
    split = make_split(tmp_path, 10, 4)
    with caplog.at_level("WARNING"):
        run(split, bad_at(3, 4, 9), max_bad_fraction=0.3)
    check(split, {3, 4, 9})
    assert split.skipped()[0] == Skipped(3, "3.jpg", "damaged at row 3")
    listed = [json.loads(file.read_text()) for file in sorted((tmp_path / "shards").iterdir())]
    assert [[s["row"] for s in record["skipped"]] for record in listed] == [[3], [4], [9]]
    assert "9.jpg: skipped: damaged at row 9" in caplog.text


def test_too_many_bad_images_end_extraction_and_are_named(tmp_path):
    split = make_split(tmp_path, 10, 4)
    with pytest.raises(extract.BadImagesError) as error:
        run(split, bad_at(1, 5, 6), max_bad_fraction=0.2)
    assert "3 of 10 images cannot be read, more than --max_bad_fraction=0.2 allows" in str(error.value)
    assert str(error.value).splitlines()[1:] == [f"  {k}.jpg: damaged at row {k}" for k in (1, 5, 6)]
    assert split.unfinished() == [1, 2]  # shard 0 was complete before
    with pytest.raises(extract.BadImagesError):  # images skipped by the first run count too
        run(split, bad_at(5, 6), max_bad_fraction=0.2)
    run(split, bad_at(5, 6), max_bad_fraction=0.3)
    check(split, {1, 5, 6})
    with pytest.raises(extract.BadImagesError, match="1 of 5"):
        run(make_split(tmp_path / "other", 5, 5), bad_at(0), max_bad_fraction=0)


def test_a_split_of_bad_images_only(tmp_path):
    split = make_split(tmp_path, 5, 2)
    run(split, bad_at(*range(5)), lambda _: pytest.fail("there is nothing to encode"))
    check(split, set(range(5)))


def test_extraction_resumes_at_the_unfinished_shards(tmp_path):
    loaded = []

    def load(row: int) -> np.ndarray:
        loaded.append(row)
        return pixels(row)

    def dying(images_IYX3: np.ndarray) -> np.ndarray:
        if images_IYX3.max() >= 8:
            raise KeyboardInterrupt
        return encode(images_IYX3)

    split = make_split(tmp_path, 14, 4)
    with pytest.raises(KeyboardInterrupt):
        run(split, load, dying)
    assert split.unfinished() == [2, 3]
    loaded.clear()
    run(split, load)
    assert sorted(loaded) == list(range(8, 14))
    check(split)
    (tmp_path / "shards" / "00001.json").unlink()
    loaded.clear()
    run(split, load)
    assert sorted(loaded) == [4, 5, 6, 7]
    check(split)
    loaded.clear()
    run(split, load)
    assert not loaded


def test_errors_other_than_bad_images_are_raised(tmp_path):
    def load(row: int) -> np.ndarray:
        if row == 5:
            raise OSError("the disk is gone")
        return pixels(row)

    split = make_split(tmp_path, 10, 4)
    with pytest.raises(OSError, match="the disk is gone"):
        run(split, load)
    assert split.unfinished() == [1, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_that_start_at_different_times_share_the_shards(tmp_path, monkeypatch, count):
    # They run one after another here, so a later one finds fewer unfinished shards. Each shard is computed once.
    split, done = make_split(tmp_path, 14, 2), []
    for process in range(count):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        run(split, lambda row: done.append(row) or pixels(row))
    assert sorted(done) == list(range(14))
    check(split)
