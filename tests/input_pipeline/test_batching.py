"""A batch is a function of seed and step; an epoch has every caption once, with little padding."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.errors import UserError
from flaxcap.input_pipeline.batching import Plan, choose_buckets
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import END, PAD, START


def tokens_of(lengths: list[list[int]]) -> Tokens:
    """Returns captions of these lengths, for each image a list; each word of a caption is its number plus 10."""
    ids, starts, rows = [], [0], []
    for row, captions in enumerate(lengths):
        for length in captions:
            ids += [START, *[10 + len(rows)] * (length - 2), END]
            starts.append(len(ids))
            rows.append(row)
    return Tokens(np.array(ids, np.int32), np.array(starts), np.array(rows, np.int32))


LENGTHS = st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=7), min_size=1, max_size=30)


def captions_in(batch) -> list[tuple[int, tuple[int, ...]]]:
    """Returns (row, ids without <pad>) of every caption in a batch."""
    found = []
    for row, tokens_CT in zip(batch.rows_I, batch.tokens_ICT, strict=True):
        found += [(int(row), tuple(t[t != PAD].tolist())) for t in tokens_CT if t.any()]
    return found


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_every_caption_occurs_once_in_an_epoch_with_its_own_image(lengths, images, captions, buckets, epoch):
    tokens = tokens_of(lengths)
    plan = Plan(tokens, batch_images=images, captions_per_image=captions, num_buckets=buckets, seed=7)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    expected = sorted(
        (int(row), tuple(tokens.ids[a:b].tolist()))
        for row, (a, b) in zip(tokens.rows, itertools.pairwise(tokens.starts), strict=True)
    )
    shuffled = sorted(c for step in steps for c in captions_in(plan.batch(step)))
    in_order = sorted(c for n in range(plan.steps_per_epoch) for c in captions_in(plan.in_order(n)))
    assert shuffled == expected
    assert in_order == expected
    assert plan.num_captions == len(expected)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from([2, 4, 8]), st.integers(1, 5))
def test_an_image_never_leaves_the_device_of_its_column(lengths, images, captions):
    plan = Plan(tokens_of(lengths), batch_images=images, captions_per_image=captions, num_buckets=3)
    for devices in (d for d in (1, 2, 4, 8) if images % d == 0):
        width = images // devices
        own = [set(plan.column_rows(d * width, (d + 1) * width)) for d in range(devices)]
        for step in range(2 * plan.steps_per_epoch):
            rows_I = plan.batch(step).rows_I
            for device in range(devices):
                assert set(rows_I[device * width : (device + 1) * width]) - {-1} <= own[device]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    tokens = tokens_of([[5, 9], [4], [12, 3, 3], [7], [8, 8]] * 4)
    options: dict[str, Any] = {"batch_images": 4, "captions_per_image": 2, "num_buckets": 2}
    one, two = Plan(tokens, seed=3, **options), Plan(tokens, seed=3, **options)
    forward = [one.batch(step) for step in range(20)]
    for step in reversed(range(20)):  # another order, which must not matter
        for a, b in zip(two.batch(step), forward[step], strict=True):
            np.testing.assert_array_equal(a, b)
    other = Plan(tokens, seed=4, **options)
    assert any((other.batch(s).rows_I != forward[s].rows_I).any() for s in range(other.steps_per_epoch))


def test_epochs_differ():
    plan = Plan(tokens_of([[5]] * 32), batch_images=4, captions_per_image=1, num_buckets=1)
    first = [tuple(plan.batch(s).rows_I) for s in range(8)]
    second = [tuple(plan.batch(8 + s).rows_I) for s in range(8)]
    assert first != second
    assert sorted(sum(first, ())) == sorted(sum(second, ()))


def test_a_batch_is_padded_to_the_shortest_bucket_that_holds_it():
    plan = Plan(tokens_of([[n] for n in range(3, 19)]), batch_images=2, captions_per_image=1, num_buckets=4)
    for step in range(plan.steps_per_epoch):
        tokens_ICT = plan.batch(step).tokens_ICT
        longest = (tokens_ICT != PAD).sum(-1).max()
        assert tokens_ICT.shape[-1] == min(b for b in plan.buckets if b >= longest)


def test_padding_is_the_share_of_pad_in_an_epoch():
    plan = Plan(tokens_of([[3, 8], [4], [6, 6, 5]] * 5), batch_images=4, captions_per_image=2, num_buckets=2)
    batches = [plan.batch(s).tokens_ICT for s in range(plan.steps_per_epoch)]
    pads, tokens = sum((b == PAD).sum() for b in batches), sum(b.size for b in batches)
    assert plan.padding == pytest.approx(pads / tokens)


def test_skipped_images_do_not_occur():
    plan = Plan(tokens_of([[5]] * 10), batch_images=2, captions_per_image=1, num_buckets=1, skip={3, 7})
    rows = {int(r) for s in range(plan.steps_per_epoch) for r in plan.batch(s).rows_I}
    assert rows == set(range(10)) - {3, 7}


def test_no_caption_at_all_is_an_error():
    with pytest.raises(UserError, match="no image with"):
        Plan(tokens_of([[5]]), batch_images=2, captions_per_image=1, num_buckets=1, skip={0})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=40), st.integers(1, 4))
def test_no_other_buckets_pad_less(lengths, count):
    chosen = choose_buckets(np.array(lengths), count)

    def padded(buckets) -> int:
        return sum(min(b for b in buckets if b >= length) for length in lengths)

    distinct = sorted(set(lengths))
    every = itertools.combinations(distinct, min(count, len(distinct)))
    assert padded(chosen) == min(padded(c) for c in every if c[-1] == distinct[-1])
    assert list(chosen) == sorted(chosen)
