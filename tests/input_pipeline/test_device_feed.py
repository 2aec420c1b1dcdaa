"""Features in device memory and features streamed from the store give the same batches."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_step
from etils import epath

from flaxcap.bench import synthetic
from flaxcap.config import ConfigError
from flaxcap.features.shards import Row, Split, write_rows
from flaxcap.input_pipeline.batching import Plan
from flaxcap.input_pipeline.device_feed import Feed, Inputs, rows
from flaxcap.runtime import sharding
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import END, START

N, F = 21, 3


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """A store of N images; the features of an image are the number of its row."""
    path = epath.Path(tmp_path_factory.mktemp("store"))
    found = Split(path, N, shard_rows=8)
    write_rows(path, (Row(r, f"{r}.jpg", ("a b",) * (1 + r % 7)) for r in range(N)))
    feats_NPF = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None], (N, 64, F))
    found.create_array(64, F, "bfloat16")[:].write(feats_NPF.astype(ml_dtypes.bfloat16)).result()
    return found


def plan(images: int = 8, batches_per_dispatch: int = 1) -> Plan:
    rows = [r for r in range(N) for _ in range(1 + r % 7)]
    lengths = [3 + (7 * m) % 5 for m in range(len(rows))]
    ids = [t for n in lengths for t in [START, *[5] * (n - 2), END]]
    tokens = Tokens(np.array(ids, np.int32), np.cumsum([0, *lengths]), np.array(rows, np.int32))
    options: dict[str, Any] = {"batch_images": images, "batches_per_dispatch": batches_per_dispatch}
    return Plan(tokens, captions_per_image=2, num_buckets=2, seed=1, **options)


def features(inputs: Inputs, batch: int) -> np.ndarray:
    """Returns `feats_IPF` of a batch; each device reads its own part of the bank."""
    index_I = np.asarray(inputs.index_JI)[batch]
    parts = [shard.data for shard in inputs.bank_NPF.addressable_shards]
    found = zip(parts, np.split(index_I, len(parts)), strict=True)
    return np.concatenate([np.asarray(rows(part, jnp.asarray(index)), np.float32) for part, index in found])


@pytest.mark.parametrize("batches_per_dispatch", [1, 3])
@pytest.mark.parametrize("mode", ["device", "stream"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_image_gets_its_own_features_and_captions(split, devices, mode, batches_per_dispatch):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    batches = plan(batches_per_dispatch=batches_per_dispatch)
    feed = Feed(split, batches, mesh, mode)
    assert feed.resident == (mode == "device")
    last = 2 * batches.steps_per_epoch
    shapes = set()
    step = 0
    for sent, inputs in feed.ahead(batches.dispatches(0, last)):
        assert int(inputs.count) == len(sent)
        shapes.add(inputs.tokens_JICT.shape)
        assert inputs.weight_JIC.shape == inputs.tokens_JICT.shape[:3]
        assert (np.asarray(inputs.weight_JIC) == 1).all()
        for j in range(len(sent)):
            batch = batches.batch(step)
            np.testing.assert_array_equal(inputs.tokens_JICT[j], batch.tokens_ICT)
            np.testing.assert_array_equal(sent[j].tokens_ICT, batch.tokens_ICT)
            present = batch.rows_I >= 0
            feats_IPF = features(inputs, j)
            np.testing.assert_array_equal(feats_IPF[present, 63, 0], batch.rows_I[present])
            assert np.isfinite(feats_IPF).all()  # padding too: a NaN would spread through the gradients
            step += 1
        spec = feed.spec(inputs.tokens_JICT.shape[-1])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), inputs)
        assert spec == like
    assert step == last
    assert len(shapes) == len(batches.buckets)  # one compilation a bucket, whatever the number of batches in a dispatch


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_captions_are_replaced_and_read_back(split, devices):
    """`Feed.local` returns from the devices what was put there, in the order of the batch."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    batches = plan(batches_per_dispatch=3)
    feed = Feed(split, batches, mesh, "stream")
    assert feed.lengths == batches.buckets.tolist()
    sent, inputs = next(iter(feed.ahead(batches.dispatches(0, 9))))
    assert len(sent) > 1
    np.testing.assert_array_equal(feed.local(inputs.tokens_JICT), inputs.tokens_JICT)
    np.testing.assert_array_equal(feed.local_rows(sent), [batch.rows_I for batch in sent])

    rng = np.random.default_rng(0)
    tokens_JICT = rng.integers(0, 9, (*inputs.tokens_JICT.shape[:3], 4), dtype=np.int32)
    weight_JIC = rng.standard_normal(tokens_JICT.shape[:3]).astype(np.float32)
    other = feed.replace(inputs, tokens_JICT, weight_JIC)
    np.testing.assert_array_equal(feed.local(other.tokens_JICT), tokens_JICT)
    np.testing.assert_array_equal(feed.local(other.weight_JIC), weight_JIC)
    assert other.bank_NPF is inputs.bank_NPF
    assert other.index_JI is inputs.index_JI
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)
    assert feed.spec(4) == like  # a step compiled for this length accepts them


def test_each_device_holds_only_what_its_columns_need(split):
    mesh = sharding.make_mesh(jax.devices()[:8])
    bank = Feed(split, plan(), mesh, "device")([plan().batch(0)]).bank_NPF
    rows = max(len(plan().column_rows(d, d + 1)) for d in range(8))
    assert {s.data.shape for s in bank.addressable_shards} == {(rows, 64, F)}
    assert rows < N


def test_a_batch_that_the_devices_do_not_divide_is_refused(split):
    with pytest.raises(ConfigError, match=r"batch_images=4.*multiple of the 8 devices"):
        Feed(split, plan(4), sharding.make_mesh(jax.devices()[:8]))


def test_an_error_of_the_reading_thread_reaches_the_loop(split):
    feed = Feed(split, plan(), sharding.make_mesh(jax.devices()[:1]), "stream")
    bad = plan().batch(0)._replace(rows_I=np.full(8, N + 5, np.int32))
    with pytest.raises(ValueError, match="cannot be read"):
        list(feed.ahead([[plan().batch(0)], [bad]]))


def test_a_step_does_not_convert_the_bank_to_another_dtype():
    images, mesh = 1024, sharding.make_mesh(jax.devices()[:1])
    source = synthetic.SyntheticFeatures(images, 64, small_step.F, np.dtype(ml_dtypes.bfloat16))
    feed = Feed(source, synthetic.plan(images, small_step.changed(batch_images=8)), mesh, "device")
    train_step, state = small_step.made(mesh)
    compiled = train_step.lower(state, feed.spec(8)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < images * 64 * small_step.F * source.dtype.itemsize / 2


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_features_that_repeat_are_placed_by_the_device(dtype, monkeypatch):
    """The device's own copy of the rows is that of `read`, which is not called."""
    monkeypatch.setattr(synthetic, "BLOCK", 7)
    source = synthetic.SyntheticFeatures(20, 4, 3, np.dtype(dtype))
    given = synthetic.plan(20, small_step.changed(batch_images=8))
    expected = source.read(np.arange(20))
    monkeypatch.setattr(source, "read", lambda rows: pytest.fail("the host copied features"))
    feed = Feed(source, given, sharding.make_mesh(jax.devices()[:2]), "device")
    for batches in given.dispatches(0, given.steps_per_epoch):
        inputs = feed(batches)
        shards = sorted(inputs.bank_NPF.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        for j, batch in enumerate(batches):
            for columns, shard in zip(np.split(np.arange(8), 2), shards, strict=True):
                found = np.asarray(rows(shard.data, np.asarray(inputs.index_JI)[j, columns]))
                present = batch.rows_I[columns] >= 0
                np.testing.assert_array_equal(found[present], expected[batch.rows_I[columns]][present])
