"""Self-critical training: sampled captions, weighted by their CIDEr-D, train the decoder to sample better captions."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from tiny_store import tiny_config, write_store

from flaxcap.config import Config, Dropout
from flaxcap.features.shards import Split
from flaxcap.features.store import Store
from flaxcap.input_pipeline.device_feed import Inputs
from flaxcap.metrics import scorer as scorer_lib
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import devices, sharding
from flaxcap.text.vocabulary import END, PAD, START, Vocabulary
from flaxcap.training import self_critical, validation
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import init_state

CONFIG = tiny_config(captions_per_image=4, schedule="constant", warmup_steps=0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    write_store(path, CONFIG, images=11)
    return path


class Run:
    """The parts of a self-critical run."""

    def __init__(self, data_dir: pathlib.Path, config: Config = CONFIG, devices: int = 2, batches: int = 2):
        prepared = Store.finished(data_dir, config)
        self.split: Split = prepared.split("train")
        self.vocabulary: Vocabulary = prepared.vocabulary()
        self.captions = [row.captions for row in self.split.rows]
        self.mesh = sharding.make_mesh(jax.devices()[:devices])
        self.plan, self.feed = validation.make_feed(config, self.split, self.vocabulary, self.mesh, batches)
        bind, init = decoder_lib.create(
            config, decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(self.vocabulary))
        )
        schedule = learning_rate(config.train, 10)
        optimizer = make_optimizer(config.train)
        self.state = init_state(init, optimizer, 0, self.mesh)
        self.sample = self_critical.SelfCritical(bind, config, self.mesh, self.feed, self.vocabulary, self.captions)
        self.step = self_critical.make_train_step(bind, optimizer, schedule, self.mesh, config.train)
        self.plain_step = step_lib.make_train_step(bind, optimizer, schedule, self.mesh, CONFIG.train, 1)

    def dispatches(self, first: int, last: int) -> Any:
        return self.feed.ahead(self.plan.dispatches(first, last))

    def sampled(self) -> tuple[Any, Inputs, Inputs]:
        """Returns the batches of an epoch's only dispatch, its inputs, and the inputs with sampled captions."""
        batches, inputs = next(iter(self.dispatches(0, self.plan.steps_per_epoch)))
        return batches, inputs, self.sample(self.state, inputs, batches)[0]

    def texts(self, tokens_ICT: Any) -> list[str]:
        return [self.vocabulary.decode(t[1:]) for t in np.asarray(tokens_ICT).reshape(-1, np.shape(tokens_ICT)[-1])]


@pytest.fixture(scope="module")
def two(data_dir) -> Run:
    return Run(data_dir)


def encoded(run: Run, texts: list[str], length: int = 10) -> np.ndarray:
    """Returns captions as they are sampled: words, <end>, <pad>."""
    tokens_BT = np.full((len(texts), length), PAD, np.int32)
    for tokens_T, text in zip(tokens_BT, texts, strict=True):
        ids = run.vocabulary.encode(text, length + 1)[1:]
        tokens_T[: len(ids)] = ids
    return tokens_BT


def test_a_captions_weight_is_its_reward_above_the_mean_of_the_images_other_captions(two):
    """An image's weights sum to 0, and its better captions have positive weights."""
    rows_I = np.array([3, 7])
    texts = [[two.captions[row][0], "a", f"{two.captions[row][0]} mat mat", "under under big"] for row in rows_I]
    tokens_ICT = np.stack([encoded(two, some) for some in texts])
    weight_IC, mean = two.sample._advantages(tokens_ICT, rows_I)
    np.testing.assert_allclose(weight_IC.sum(1), 0, atol=1e-6)
    assert (weight_IC.argmax(1) == 0).all()
    assert (weight_IC[:, 0] > 0.5).all()
    assert (weight_IC[:, 3] < 0).all()

    # <end> counts as a word: "theend" stands for it here.
    scorer = scorer_lib.Scorer([[f"{text} theend" for text in some] for some in two.captions])
    flat = [f"{text} theend" for some in texts for text in some]
    rewards_IC = scorer.cider(flat, np.repeat(rows_I, 4)).reshape(2, 4)
    expected_IC = [[r - (sum(some) - r) / 3 for r in some] for some in rewards_IC]
    np.testing.assert_allclose(weight_IC, expected_IC, atol=1e-5)
    np.testing.assert_allclose(mean, rewards_IC.mean(), rtol=1e-5)


def test_a_caption_without_its_last_word_has_a_lower_reward(two):
    """<end> counts as a word. Otherwise a caption that stops before its last word would lose little."""
    row = max(range(11), key=lambda row: len(two.captions[row][0].split()))
    words = two.captions[row][0].split()
    assert len(words) > 3
    tokens_1CT = encoded(two, [" ".join(words), " ".join(words[:-1])])[None]
    assert np.diff(two.sample._advantages(tokens_1CT, np.array([row]))[0])[0, 0] < -0.5


def test_equal_captions_and_padding_have_no_weight(two):
    tokens_ICT = np.stack([encoded(two, ["a dog runs"] * 4), encoded(two, ["a dog", "a", "a cat", "mat"])])
    np.testing.assert_array_equal(two.sample._advantages(tokens_ICT, np.array([2, -1]))[0], 0)


def test_sampled_captions_replace_the_true_captions(two):
    """They are <start>, words, <end> and <pad>, of few lengths. An image's captions differ; its weights sum to 0."""
    batches, inputs, found = two.sampled()
    assert len(batches) == 2 == two.plan.steps_per_epoch
    tokens_JICT, weight_JIC = np.asarray(found.tokens_JICT), np.asarray(found.weight_JIC)
    assert tokens_JICT.shape[:3] == inputs.tokens_JICT.shape[:3] == (2, 8, 4)
    assert tokens_JICT.shape[-1] in [*two.plan.buckets, 11]
    assert (tokens_JICT != PAD).sum(-1).max() <= tokens_JICT.shape[-1]
    rows_JI = np.stack([batch.rows_I for batch in batches])
    assert (rows_JI < 0).sum() == 5  # padding, which has no weight
    for j, i in zip(*np.nonzero(rows_JI >= 0), strict=True):
        assert len(np.unique(tokens_JICT[j, i], axis=0)) == 4
        for tokens_T in tokens_JICT[j, i]:
            (end,) = np.flatnonzero(tokens_T == END)
            assert tokens_T[0] == START
            assert (tokens_T[end + 1 :] == PAD).all()
            assert (tokens_T[1:end] > END).all()
    np.testing.assert_allclose(weight_JIC.sum(-1), 0, atol=1e-5)
    assert (weight_JIC[rows_JI < 0] == 0).all()
    assert np.abs(weight_JIC[rows_JI >= 0]).max() > 0.05
    # Each caption is compared with the true captions of its own image.
    scorer = scorer_lib.Scorer([[f"{text} theend" for text in some] for some in two.captions])
    for j, i in zip(*np.nonzero(rows_JI >= 0), strict=True):
        texts = [f"{text} theend" for text in two.texts(tokens_JICT[j, i])]
        rewards_C = scorer.cider(texts, np.repeat(rows_JI[j, i], 4))
        np.testing.assert_allclose(weight_JIC[j, i], (rewards_C - rewards_C.mean()) * 4 / 3, atol=1e-4)
    assert found.bank_NPF is inputs.bank_NPF
    assert found.index_JI is inputs.index_JI
    assert int(found.count) == 2


@pytest.mark.parametrize("devices", [1, 8])
def test_any_number_of_devices_samples_the_same_captions(data_dir, two, devices):
    batches, _, expected = two.sampled()
    *_, found = Run(data_dir, devices=devices).sampled()
    present_JI = np.stack([batch.rows_I for batch in batches]) >= 0
    ours, others = (np.asarray(x.tokens_JICT)[present_JI] for x in (found, expected))
    np.testing.assert_array_equal(ours, others)
    np.testing.assert_allclose(found.weight_JIC, expected.weight_JIC)


def test_each_step_and_each_batch_samples_different_captions(two):
    batches, inputs, found = two.sampled()
    again, _ = two.sample(two.state, inputs, batches)
    np.testing.assert_array_equal(again.tokens_JICT, found.tokens_JICT)
    later, _ = two.sample(two.state._replace(step=two.state.step + 1), inputs, batches)
    assert later.tokens_JICT.shape != found.tokens_JICT.shape or (later.tokens_JICT != found.tokens_JICT).any()
    same = inputs._replace(index_JI=jax.device_put(np.zeros_like(inputs.index_JI), inputs.index_JI.sharding))
    first, second = np.asarray(two.sample(two.state, same, batches[:1] * 2)[0].tokens_JICT)
    assert (first != second).any()  # the images are the same


def test_a_batch_of_padding_has_no_weight(two):
    batches, inputs, _ = two.sampled()
    found, cider_J = two.sample(two.state, inputs, batches[:1])
    assert np.abs(found.weight_JIC[0]).max() > 0
    assert len(cider_J) == 1
    assert (np.asarray(found.weight_JIC[1]) == 0).all()


NOISY: dict[str, Any] = {
    "dropout": Dropout(0.5, 0.5, 0.5, 0.5, 0.5),
    "label_smoothing": 0.3,
    "doubly_stochastic": 1.0,
    "scheduled_sampling": 1.0,
}


def words_only(params: Any, temperature: float = 1.0) -> Any:
    """Gives tokens that are never sampled no probability, and divides the logits by the temperature."""
    kernel, bias_V = (params["vocabulary"][name] for name in ("kernel", "bias"))
    return params | {"vocabulary": {"kernel": kernel / temperature, "bias": bias_V.at[:END].set(-1e9) / temperature}}


def test_captions_are_sampled_and_learned_at_the_temperature(data_dir, two):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, cider_temperature=0.5))
    cool, plain = Run(data_dir, config), Run(data_dir)
    cooled = plain.state._replace(params=words_only(plain.state.params, 0.5))
    batches, inputs = next(iter(plain.dispatches(0, plain.plan.steps_per_epoch)))
    ours, expected = cool.sample(cool.state, inputs, batches)[0], plain.sample(cooled, inputs, batches)[0]
    assert (np.asarray(ours.tokens_JICT) == expected.tokens_JICT).all()
    assert (
        ours.tokens_JICT.shape != two.sampled()[2].tokens_JICT.shape
        or (np.asarray(ours.tokens_JICT) != two.sampled()[2].tokens_JICT).any()
    )
    _, found = cool.step(cool.state, ours)
    _, of_plain = plain.plain_step(cooled, ours)
    np.testing.assert_allclose(found["loss"][0], of_plain["loss"][0], rtol=1e-5)
    assert abs(float(found["loss"][0])) > 1e-3


def test_the_step_has_no_dropout_and_no_additional_terms(data_dir, two):
    """Its gradient is that of the reward alone."""
    _, _, found = two.sampled()
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **NOISY))
    noisy = Run(data_dir, config)
    ours, metrics_of_ours = as_for_users(noisy.step, noisy.state, found)
    # Tokens that are never sampled have no gradient.
    state = Run(data_dir).state
    state = state._replace(params=words_only(state.params))
    expected, expected_metrics = as_for_users(noisy.plain_step, state, found)
    jax.tree.map(np.testing.assert_array_equal, words_only(ours.params), expected.params)
    jax.tree.map(np.testing.assert_array_equal, metrics_of_ours, expected_metrics)


def as_for_users(step: Any, *args: Any) -> Any:
    """Runs a step with the compiler options that users have.

    With the tests' options (see command.py) XLA:CPU (jaxlib 0.10) rounds two programs of equal sums differently.
    """
    return step.lower(*args).compile(devices.compiler_option("xla_cpu_use_fusion_emitters", "True"))(*args)


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_captions_without_weight_change_no_parameter(data_dir, attention):
    """If no caption is better than the image's others, the gradient is 0."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, attention=attention))
    run = Run(data_dir, config)
    _, _, found = run.sampled()
    before = jax.device_get(run.state.params)
    weight_JIC = jax.device_put(np.zeros_like(found.weight_JIC), found.weight_JIC.sharding)
    state, step_metrics = run.step(run.state, found._replace(weight_JIC=weight_JIC))
    assert float(step_metrics["tokens"][0]) > 0
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_captions_of_padding_are_not_counted(data_dir):
    """They are neither among the captions nor among the tokens that the gradient is divided by."""
    run = Run(data_dir)
    batches, _, found = run.sampled()
    _, step_metrics = run.step(run.state, found)
    present_JI = np.stack([batch.rows_I for batch in batches]) >= 0
    words_JIC = (np.asarray(found.tokens_JICT)[..., 1:] != PAD).sum(-1)
    np.testing.assert_array_equal(step_metrics["captions"], 4 * present_JI.sum(1))
    np.testing.assert_array_equal(step_metrics["tokens"], (words_JIC.sum(-1) * present_JI).sum(1))


def test_a_decoder_learns_to_sample_captions_of_higher_reward(data_dir):
    """From random parameters, with sampled captions alone, the mean CIDEr-D doubles."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, learning_rate=5e-3))
    run = Run(data_dir, config)
    scorer = scorer_lib.Scorer(run.captions)
    state, rewards, logged = run.state, [], []
    for batches, inputs in run.dispatches(0, 600):
        found, cider_J = run.sample(state, inputs, batches)
        for j, batch in enumerate(batches):
            present = batch.rows_I >= 0
            texts = run.texts(np.asarray(found.tokens_JICT)[j, present])
            rewards.append(scorer.cider(texts, np.repeat(batch.rows_I[present], 4)).mean())
            logged.append(cider_J[j])
        state, _ = run.step(state, found)
    assert np.mean(rewards[-40:]) > 2 * np.mean(rewards[:4]) > 0.2
    assert np.mean(logged[-40:]) > 2 * np.mean(logged[:4]) > 0
