"""What a run measures of itself: the captions that its model makes of a split, and what they are worth."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from tiny_store import tiny_config, write_store

from flaxcap.config import Decode
from flaxcap.decoding import generate
from flaxcap.features.shards import Skipped, Split
from flaxcap.features.store import Store
from flaxcap.metrics import scorer
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.training import step as step_lib
from flaxcap.training import validation
from flaxcap.training.finetune import FEATURES

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Store:
    """Of its 40 training images, rows 3 and 17 have no features."""
    path: pathlib.Path = tmp_path_factory.mktemp("data")
    written = write_store(path, CONFIG)
    split = written.split("train")
    for number, row in ((0, 3), (1, 17)):
        split.mark_finished(number, [Skipped(row, f"train{row}.jpg", "not a picture")])
    return Store.finished(path, CONFIG)


class Captioner:
    """An untrained model, far enough from its start to say different things of different images."""

    def __init__(self, prepared: Store, **options: Any):
        self.split: Split = prepared.split("train")
        self.vocabulary: Vocabulary = prepared.vocabulary()
        self.bind, init = decoder_lib.create(
            CONFIG, decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(self.vocabulary))
        )
        rng = np.random.default_rng(2)
        shapes = jax.eval_shape(init, jax.random.key(0))
        params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
        self.params = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
        self.run = generate.Generator(self.bind, Decode(**{"max_length": 8, **options}))

    def captions(self, batch_size: int = 16, seed: int = 0) -> validation.Captions:
        frozen, rows = self.run.freeze(self.params), self.split.present()
        return validation.captions_of(self.run, frozen, self.vocabulary, rows, self.split.read, batch_size, seed)


@pytest.fixture(scope="module")
def captioner(prepared) -> Captioner:
    return Captioner(prepared)


def test_every_image_with_features_has_its_own_caption(captioner):
    """In the split's order; an image that was skipped has none."""
    present = captioner.split.present()
    assert present == [row for row in range(40) if row not in (3, 17)]
    found = captioner.captions()
    feats_IPF = captioner.split.read(present)
    alone = jax.device_get(captioner.run(captioner.run.freeze(captioner.params), feats_IPF, jax.random.key(0)))
    assert found.texts == [captioner.vocabulary.decode(t) for t in alone.tokens_IT]
    np.testing.assert_allclose(found.log_probs, alone.log_prob_I, rtol=1e-4)
    assert len(set(found.texts)) > 10


@pytest.mark.parametrize("batch_size", [1, 8, 24, 100])
def test_it_does_not_matter_how_many_are_decoded_at_once(captioner, batch_size):
    found = captioner.captions(batch_size)
    assert found.texts == captioner.captions().texts
    np.testing.assert_allclose(found.log_probs, captioner.captions().log_probs, rtol=1e-4)


def test_sampled_captions_follow_their_seed(prepared):
    captioner = Captioner(prepared, method="sample", temperature=20.0)
    found = captioner.captions()
    assert found == captioner.captions()
    other = captioner.captions(seed=1)
    assert np.mean([a != b for a, b in zip(found.texts, other.texts, strict=True)]) > 0.5


def test_validation_tells_loss_accuracy_and_the_cider_of_the_captions(captioner, prepared):
    mesh = sharding.make_mesh()
    eval_step = step_lib.make_eval_step(captioner.bind, mesh, CONFIG.train)
    validate = validation.Validation(
        CONFIG, captioner.split, captioner.vocabulary, mesh, captioner.run, eval_step, FEATURES
    )
    found = validate(captioner.params)
    plan, feed = validation.make_feed(CONFIG, captioner.split, captioner.vocabulary, mesh)
    loss, accuracy = validation.cross_entropy(eval_step, captioner.params, plan, feed)
    references = [captioner.split.rows[row].captions for row in captioner.split.present()]
    cider = scorer.score(captioner.captions().texts, references)["CIDEr"]
    assert found == {"loss": loss, "accuracy": accuracy, "cider": pytest.approx(cider)}
    assert cider > 0
    assert validate(captioner.params) == found


def test_validation_counts_every_caption_once_whatever_the_batch(tmp_path):
    config = tiny_config()
    prepared = write_store(tmp_path, config)
    vocabulary, split = prepared.vocabulary(), prepared.split("val")
    captions = [text for row in split.rows for text in row.captions]
    tokens = sum(len(vocabulary.encode(text, config.data.max_length)) - 1 for text in captions)
    bind, init = decoder_lib.create(
        config, decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(vocabulary))
    )
    found = []
    for images, captions_per_image in ((8, 1), (8, 5), (32, 2)):
        config = tiny_config(batch_images=images, captions_per_image=captions_per_image)
        mesh = sharding.make_mesh(jax.devices()[:8])
        params = jax.device_put(init(jax.random.key(0)), sharding.replicated(mesh))
        eval_step = step_lib.make_eval_step(bind, mesh, config.train)
        plan, feed = validation.make_feed(config, split, vocabulary, mesh)
        found.append(validation.cross_entropy(eval_step, params, plan, feed))
        batches = ([plan.in_order(n)] for n in range(plan.steps_per_epoch))
        assert sum(float(eval_step(params, inputs).tokens) for _, inputs in feed.ahead(batches)) == tokens
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-5)
