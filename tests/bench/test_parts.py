"""The parts of benchmarks: synthetic data, counted arithmetic, the machine's peak, photographs, statistics."""

import io
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from PIL import Image

from flaxcap.bench import base, extract, machine, synthetic
from flaxcap.config import Config, Data, Model, Train
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer
from flaxcap.models.recurrent import RecurrentDecoder
from flaxcap.text.vocabulary import END, START


def test_captions_have_cocos_lengths_and_zipfs_words():
    data = Data(vocab_size=5000, max_length=50)
    tokens = synthetic.captions(4000, data, seed=3)
    lengths = np.diff(tokens.starts)
    assert len(lengths) == 20_000
    assert tokens.starts[-1] == len(tokens.ids)
    assert (tokens.rows == np.arange(20_000) // 5).all()
    assert lengths.min() == 8
    assert lengths.mean() == pytest.approx(12.5, abs=0.1)
    assert lengths.std() == pytest.approx(2.4, abs=0.1)
    assert (tokens.ids[tokens.starts[:-1]] == START).all()
    assert (tokens.ids[tokens.starts[1:] - 1] == END).all()
    words = tokens.ids[tokens.ids > END]
    assert len(words) == lengths.sum() - 2 * 20_000
    assert words.max() <= 5000 == synthetic.vocabulary_size(data) - 1
    counts = np.bincount(words)
    assert counts[4] / counts[40] == pytest.approx(10, rel=0.15)


def test_captions_are_cut_and_drawn_from_their_seed():
    data = Data(vocab_size=1, max_length=10)
    tokens = synthetic.captions(100, data)
    assert np.diff(tokens.starts).max() == 10
    assert (tokens.ids[tokens.starts[1:] - 1] == END).all()
    assert set(tokens.ids) == {START, END, END + 1}
    again, other = synthetic.captions(100, data), synthetic.captions(100, data, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(tokens, again, strict=True))
    assert not np.array_equal(tokens.starts, other.starts)


def test_features_repeat_and_are_not_negative():
    source = synthetic.SyntheticFeatures(1000, 64, 3, np.dtype(np.float32))
    feats_IPF = source.read([0, 1, synthetic.BLOCK, synthetic.BLOCK + 1])
    assert source.shape == (1000, 64, 3)
    assert source.dtype == feats_IPF.dtype == np.float32
    assert feats_IPF.shape == (4, 64, 3)
    np.testing.assert_array_equal(feats_IPF[:2], feats_IPF[2:])
    assert not np.array_equal(feats_IPF[0], feats_IPF[1])
    assert feats_IPF.min() >= 0
    assert feats_IPF.mean() == pytest.approx(np.sqrt(2 / np.pi), abs=0.1)


@pytest.mark.parametrize("steps", [5, 20, 32, 70])
def test_the_timed_steps_represent_complete_epochs(steps):
    plan = synthetic.plan(2048, Config())
    dispatches = synthetic.sample(plan, steps)
    counted = synthetic.counts(dispatches)
    assert counted["steps"] == steps
    assert all(len({b.tokens_ICT.shape for b in batches}) == 1 for batches in dispatches)
    assert max(map(len, dispatches)) <= Config().train.steps_per_dispatch
    assert (counted["images"], counted["captions"]) == (64 * steps, 5 * 64 * steps)
    mean = np.diff(plan.tokens.starts).mean() - 1
    assert counted["tokens"] / counted["captions"] == pytest.approx(mean, rel=0.03)


def test_counts_leave_padding_out():
    config = Config(data=Data(vocab_size=40), train=Train(batch_images=8, num_buckets=2))
    plan = synthetic.plan(11, config)  # a batch of 8, and one of 3 images and 5 of padding
    dispatches = list(plan.dispatches(0, 2))
    counted = synthetic.counts(dispatches)
    assert {name: counted[name] for name in ("steps", "images", "captions")} == {
        "steps": 2,
        "images": 11,
        "captions": 55,
    }
    assert counted["tokens"] == np.diff(plan.tokens.starts).sum() - 55
    assert counted["padded_tokens"] == 8 * 5 * sum(len(d) * (d[0].tokens_ICT.shape[-1] - 1) for d in dispatches)


def test_a_caption_of_the_tutorials_sizes_takes_0_376_gflop():
    sizes = {"images": 2, "tokens": 115, "positions": 64, "features": 2048, "vocabulary": 5001}
    forward = RecurrentDecoder.flops(Model(), **sizes)  # ten captions of 11.5 tokens
    assert 3 * forward / 10 == pytest.approx(0.376e9, rel=0.005)


def products(function: Any, *args: Any) -> int:
    """Counts the floating-point operations of the matrix products in a function's jaxpr. A loop's body counts once."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                inner = int(np.prod([left[axis] for axis in contracted]))
                total += 2 * inner * int(np.prod(equation.outvars[0].aval.shape))
            total += sum(count(inner) for inner in jaxprs_in_params(equation.params))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize(
    "config",
    [
        Model(image_dim=6, embedding_dim=5, attention_dim=7, hidden_dim=8, head_dim=9),
        Model(
            image_dim=5, embedding_dim=4, attention_dim=3, hidden_dim=6, head_dim=2, cell="lstm", initial_state="mean"
        ),
        Model(image_dim=5, embedding_dim=4, attention_dim=3, hidden_dim=6, head_dim=2, attention_gate=True),
        Model(image_dim=5, embedding_dim=4, attention_dim=3, hidden_dim=6, head_dim=2, initial_state="mean"),
        Model(image_dim=5, embedding_dim=4, attention_dim=3, hidden_dim=6, head_dim=2, output="deep"),
        Model(image_dim=5, embedding_dim=4, attention_dim=3, hidden_dim=6, head_dim=4, tied=True),
    ],
)
def test_the_formula_equals_the_products_in_the_jaxpr(config):
    images, captions, features, words = 3, 2, 11, 23
    bind, init = decoder_lib.create(Config(model=config), decoder_lib.Sizes(64, features, words))

    def forward(params: Any, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> Any:
        decoder = bind(params)
        states_TICS, _ = decoder(feats_IPF, tokens_ICT)
        return output_layer.logits(decoder.output_weights(), states_TICS)

    feats_IPF, tokens_IC1 = np.zeros((images, 64, features), np.float32), np.ones((images, captions, 1), np.int32)
    expected = products(forward, init(jax.random.key(0)), feats_IPF, tokens_IC1)
    counts = {"images": images, "tokens": images * captions}
    formula = RecurrentDecoder.flops(config, **counts, positions=64, features=features, vocabulary=words)
    # On a CPU the attention scores end in a sum that is written as a product with ones. The formula leaves it out.
    ones = 2 * images * captions * 64 * math.gcd(config.attention_dim, 32)
    assert formula + ones == expected


def test_statistics_over_repetitions():
    found = base.medians([{"a": 1, "b": {"c": 5.0}}, {"a": 9, "b": {"c": 1.0}}, {"a": 2, "b": {"c": 3.0}}])
    assert found == {"a": 2, "b": {"c": 3.0}}
    assert base.flat(found) == {"a": 2, "b.c": 3.0}
    assert base.spread(range(11)) == {"median": 5, "p10": 1, "p90": 9}
    assert base.rates(4.0, captions=8, tokens=2) == {"captions_s": 2, "tokens_s": 0.5}


def test_the_machines_peak_counts_a_cpu_once():
    found = machine.matmul_flop_s("float32", ((128, 128, 128),))
    assert 0 < found["median"] <= found["best"] < 1e14


def test_synthetic_photographs_resemble_photographs():
    data = extract.photograph(np.random.default_rng(0))
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (640, 480))
        pixels = np.asarray(image, np.float32)
    assert 40_000 < len(data) < 200_000
    assert pixels.std() > 20
    assert np.abs(np.diff(pixels, axis=1)).mean() < pixels.std() / 3  # neighbours are similar
    assert data != extract.photograph(np.random.default_rng(1))
