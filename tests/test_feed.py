"""Features held on the devices and features streamed from the store give the same batches."""

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from flaxcap import train_step as step_lib
from flaxcap.batches import Plan
from flaxcap.config import ConfigError
from flaxcap.feed import Feed
from flaxcap.store import Row, Split, write_rows
from flaxcap.text import END, START, Tokens

N, F = 21, 3


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """A store of N images whose features are their row's number."""
    path = epath.Path(tmp_path_factory.mktemp("store"))
    found = Split(path, N, shard_rows=8)
    write_rows(path, (Row(r, f"{r}.jpg", ("a b",) * (1 + r % 7)) for r in range(N)))
    feats_NPF = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None], (N, 64, F))
    found.create_array(F, "bfloat16")[:].write(feats_NPF.astype(ml_dtypes.bfloat16)).result()
    return found


def plan(images: int = 8) -> Plan:
    rows = [r for r in range(N) for _ in range(1 + r % 7)]
    lengths = [3 + (7 * m) % 5 for m in range(len(rows))]
    ids = [t for n in lengths for t in [START, *[5] * (n - 2), END]]
    tokens = Tokens(np.array(ids, np.int32), np.cumsum([0, *lengths]), np.array(rows, np.int32))
    return Plan(tokens, batch_images=images, captions_per_image=2, num_buckets=2, seed=1)


@pytest.mark.parametrize("mode", ["device", "stream"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_image_meets_its_own_features_and_captions(split, devices, mode):
    mesh = step_lib.make_mesh(jax.devices()[:devices])
    batches = plan()
    feed = Feed(split, batches, mesh, mode)
    assert feed.resident == (mode == "device")
    gather = jax.jit(lambda inputs: step_lib.gather(mesh, inputs))
    steps = range(2 * batches.steps_per_epoch)
    for step, inputs in zip(steps, feed.ahead(batches.batch(s) for s in steps), strict=True):
        batch = batches.batch(step)
        np.testing.assert_array_equal(inputs.tokens_ICT, batch.tokens_ICT)
        present = batch.rows_I >= 0
        feats_IPF = np.asarray(gather(inputs), np.float32)
        np.testing.assert_array_equal(feats_IPF[present, 63, 0], batch.rows_I[present])
        assert np.isfinite(feats_IPF).all()  # also where no image is: a NaN would spread through the gradients


def test_each_device_holds_only_what_its_columns_need(split):
    mesh = step_lib.make_mesh(jax.devices()[:8])
    bank = Feed(split, plan(), mesh, "device")(plan().batch(0)).bank_NPF
    rows = max(len(plan().column_rows(d, d + 1)) for d in range(8))
    assert {s.data.shape for s in bank.addressable_shards} == {(rows, 64, F)}
    assert rows < N


def test_gathering_moves_nothing_between_devices(split):
    mesh = step_lib.make_mesh(jax.devices()[:8])
    inputs = Feed(split, plan(), mesh, "device")(plan().batch(0))
    text = jax.jit(lambda i: step_lib.gather(mesh, i)).lower(inputs).compile().as_text()
    assert text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))


def test_a_batch_that_the_devices_do_not_divide_is_refused(split):
    with pytest.raises(ConfigError, match=r"batch_images=4.*multiple of the 8 devices"):
        Feed(split, plan(4), step_lib.make_mesh(jax.devices()[:8]))


def test_what_the_reading_thread_meets_reaches_the_loop(split):
    feed = Feed(split, plan(), step_lib.make_mesh(jax.devices()[:1]), "stream")
    bad = plan().batch(0)._replace(rows_I=np.full(8, N + 5, np.int32))
    with pytest.raises(ValueError, match="cannot be read"):
        list(feed.ahead([plan().batch(0), bad]))
