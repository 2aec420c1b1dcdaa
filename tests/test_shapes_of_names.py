"""Suffixes tell the truth: `feats_IPF` has the axes I, P and F in every function that runs.

Every size has its own value here. A name whose array has other axes fails, and is listed with its function and shape.
"""

import ast
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shape_suffixes import FILES, Recorder, assigned_in, glossary, names_in, suffix_of

from flaxcap.config import Config, Decode, Dropout, Model, Train
from flaxcap.decoding import generate
from flaxcap.input_pipeline.batching import Plan
from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import sharding
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import SPECIAL, Vocabulary
from flaxcap.training import losses, self_critical
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import init_state

MODULES = (
    "flaxcap.models",
    "flaxcap.decoding",
    "flaxcap.input_pipeline",
    "flaxcap.training.objective",
    "flaxcap.training.losses",
    "flaxcap.training.step",
    "flaxcap.training.self_critical",
)
DEVICES, PARTS = 2, 2  # devices, and microbatches of a device
I, C, J, P, F, V, LONGEST, LENGTH, WIDTH = 44, 3, 5, 12, 13, 50, 15, 17, 4
BATCHES = 2  # of a dispatch of at most J
WIDTHS: dict[str, Any] = {"image_dim": 7, "embedding_dim": 8, "attention_dim": 9, "hidden_dim": 10, "head_dim": 8}
IMAGES, CAPTIONS = 71, 5  # of the data set, and of each of its images
VARIANTS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"cell": "lstm"},
    "deep": {"output": "deep"},
    "gate": {"attention_gate": True},
    "mean": {"initial_state": "mean"},
    "tied": {"tied": True},
    "hard": {"attention": "hard"},
    "positions": {"positions": True},
    "all": {"cell": "lstm", "output": "deep", "attention_gate": True, "initial_state": "mean", "tied": True},
}
WORDS = Vocabulary([*SPECIAL, *("".join(pair) for pair in itertools.product("abcdefg", repeat=2))][:V])


class Feats:
    """A source of features. On a CPU the feed reads bfloat16 as uint16."""

    dtype = np.dtype(jnp.bfloat16)
    shape = IMAGES, P, F

    def read(self, rows: Any) -> np.ndarray:
        return np.ones((len(rows), P, F), self.dtype)


def config_of(variant: dict[str, Any], **decode: Any) -> Config:
    """Returns a config with everything that a step may draw or add."""
    train = Train(
        batch_images=I,
        captions_per_image=C,
        microbatch_images=I // DEVICES // PARTS,
        dropout=Dropout(image=0.2, embedding=0.1, attention=0.3, recurrent=0.2, output=0.4),
        label_smoothing=0.1,
        doubly_stochastic=0.5,
        scheduled_sampling=0.9,
        ema=0.9,
    )
    return Config(model=Model(**WIDTHS | variant), train=train, decode=Decode(max_length=LENGTH, **decode))


def sizes_of_model(model: Model) -> dict[str, set[int]]:
    gates = {"gru": 3, "lstm": 4}[model.cell] * model.hidden_dim
    deep = model.image_dim + model.embedding_dim if model.output == "deep" else 0
    return {
        "P": {P},
        "F": {F},
        "D": {model.image_dim},
        "E": {model.embedding_dim},
        "H": {model.hidden_dim},
        "A": {model.attention_dim},
        "G": {gates},
        "R": {model.attention_dim + gates},
        "S": {model.hidden_dim + deep},
    }


def sizes_in_training(model: Model, part: int) -> dict[str, set[int]]:
    """Returns the sizes of each letter in a training step. `part`: rows of a device's part of the features."""
    own = I // DEVICES
    micro = own // PARTS
    entries = IMAGES * -(-CAPTIONS // C)
    return sizes_of_model(model) | {
        "I": {I, own, micro},  # of a batch, a device, a microbatch
        "C": {C},
        "J": {J, BATCHES},  # a dispatch is filled up to J batches
        "T": {LONGEST, LONGEST - 1},  # the last token is predicted, and not given
        "V": {V},
        "M": {*losses.sizes((LONGEST - 1) * micro * C)},  # the sizes that tokens are packed to
        "N": {IMAGES, part, DEVICES * part},  # of the data set, a device's part, the parts of all devices
        "L": {-(-entries // I)},
        "U": {entries},
    }


def sizes_in_decoding(model: Model, images: int, widths: set[int], lengths: set[int]) -> dict[str, set[int]]:
    """Returns the sizes of each letter in decoding. `widths`: hypotheses an image."""
    return sizes_of_model(model) | {
        "I": {images},
        "C": widths,  # an image's hypotheses are the captions of a cell
        "K": widths,
        "B": {images * width for width in widths},
        "T": lengths,
        "V": {V, -(-V // 32) * 32},  # as it is, and padded
    }


def distinct(sizes: dict[str, set[int]]) -> None:
    """Asserts that no two letters have a size in common, but those that the glossary makes equal."""
    equal = [{"C", "K"}, {"B", "I"}, {"S", "H"}]  # one hypothesis an image: B is I; not a deep output: S is H
    for a, b in itertools.combinations(sizes, 2):
        assert not sizes[a] & sizes[b] or {a, b} in equal, (a, b, sizes[a] & sizes[b])


def make_plan() -> Plan:
    """Returns batches of one bucket: every image has captions of `LONGEST` tokens, <start> and <end> included."""
    captions = [[" ".join(WORDS.tokens[4 : 2 + LONGEST])] * CAPTIONS] * IMAGES
    tokens = Tokens.of(captions, WORDS, LONGEST)
    return Plan(tokens, batch_images=I, captions_per_image=C, num_buckets=1, batches_per_dispatch=J)


def create(config: Config, vary: bool = False) -> Any:
    return decoder_lib.create(config, decoder_lib.Sizes(P, F, V, positions_vary=vary))


def train(variant: dict[str, Any], mode: str = "stream", vary: bool = False, encode: Any = None) -> Recorder:
    """Traces the steps of training and evaluation, on batches from the feed."""
    config, mesh = config_of(variant), sharding.make_mesh(jax.devices()[:DEVICES])
    plan = make_plan()
    rows = max(len(plan.column_rows(first, first + I // DEVICES)) for first in range(0, I, I // DEVICES))
    sizes = sizes_in_training(config.model, rows if mode == "device" else J * I // DEVICES)
    distinct(sizes)
    with Recorder(MODULES, sizes) as recorder:
        plan = make_plan()
        feed = Feed(Feats(), plan, mesh, mode)
        inputs = feed(next(plan.dispatches(0, BATCHES)))
        feed.spec(LONGEST)
        feed([plan.in_order(0)])
        bind, init = create(config, vary)
        optimizer, schedule = make_optimizer(config.train), learning_rate(config.train, 10)
        state = jax.eval_shape(lambda: init_state(init, optimizer, 0, mesh, config.train.ema))
        train_step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, 10, encode)
        jax.eval_shape(train_step, state, inputs)
        jax.eval_shape(step_lib.make_eval_step(bind, mesh, config.train, encode), state.params, inputs)
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params)
        decoder_lib.find(config.model.name).with_word_vectors(params, {4: np.ones(config.model.embedding_dim)})
    return recorder


def decode(variant: dict[str, Any], vary: bool = False, members: int = 1, **options: Any) -> Recorder:
    """Traces decoding by a decoder, or by an ensemble of `members`."""
    config = config_of(variant, **options)
    images = 6
    widths = {1, WIDTH} if config.decode.method == "beam" else {1}
    sizes = sizes_in_decoding(config.model, images, widths, {LENGTH})
    distinct(sizes)
    with Recorder(MODULES, sizes) as recorder:
        bind, init = create(config, vary)
        generator = generate.Generator([bind] * members, config.decode, WORDS)
        params = [jax.eval_shape(init, jax.random.key(0))] * members
        frozen = jax.eval_shape(lambda params: generator.freeze(*params), params)
        feats_IPF = jax.ShapeDtypeStruct((images, P, F), jnp.float32)
        jax.eval_shape(lambda *args: generator(*args), frozen, feats_IPF, jax.random.key(0))
    return recorder


def sample_and_score() -> Recorder:
    """Runs the sampling of self-critical training, and traces its step."""
    config, mesh = config_of({}), sharding.make_mesh(jax.devices()[:DEVICES])
    own = I // DEVICES
    sizes = sizes_in_training(config.model, J * own)
    lengths = {LENGTH, LENGTH + 1}  # of a sampled caption, without and with <start>
    sizes |= {"K": {C}, "B": {own * C, I * C}, "T": sizes["T"] | lengths, "V": {V, -(-V // 32) * 32}}
    sizes["M"] = sizes["M"] | {*losses.sizes(LENGTH * own // PARTS * C)}
    distinct(sizes)
    with Recorder(MODULES, sizes) as recorder:
        plan = make_plan()
        feed = Feed(Feats(), plan, mesh, "stream")
        batches = next(plan.dispatches(0, BATCHES))
        bind, init = create(config)
        optimizer, schedule = make_optimizer(config.train), learning_rate(config.train, 10)
        state = init_state(init, optimizer, 0, mesh)
        sample = self_critical.SelfCritical(bind, config, mesh, feed, WORDS, [["aa ab"], *[["ac"]] * (IMAGES - 1)])
        inputs, _ = sample(state, feed(batches), batches)
        train_step = self_critical.make_train_step(bind, optimizer, schedule, mesh, config.train)
        jax.eval_shape(train_step, state, inputs)
    return recorder


@pytest.fixture(scope="module")
def recorders() -> dict[str, Recorder]:
    """Runs everything once."""
    found = {f"train {name}": train(variant) for name, variant in VARIANTS.items()}
    found["train, features on the devices"] = train({}, "device")
    found["train, a trained encoder"] = train({}, encode=lambda params, frozen, feats_IPF, keys_I: feats_IPF)
    found["train, positions vary"] = train({"initial_state": "mean"}, vary=True)
    for name in ("gru", "positions", "all"):
        found[f"greedy {name}"] = decode(VARIANTS[name], method="greedy")
        found[f"beam {name}"] = decode(VARIANTS[name], method="beam", beam_width=WIDTH)
    constrained: dict[str, Any] = {"no_repeat_ngram": 2, "min_length": 2, "bad_endings": "aa"}
    found["beam, constrained"] = decode({}, method="beam", beam_width=WIDTH, **constrained)
    found["greedy, positions vary"] = decode({"initial_state": "mean"}, True, method="greedy")
    found["greedy, ensemble"] = decode({}, members=2, method="greedy")
    found["sample"] = decode({}, method="sample", top_k=6, top_p=0.5)
    found["self-critical"] = sample_and_score()
    return found


def test_every_suffix_is_the_shape(recorders):
    assert [f"{scenario}: {line}" for scenario, recorder in recorders.items() for line in sorted(recorder.wrong)] == []


def test_every_suffix_is_checked(recorders):
    """A function that no longer runs here, or a name that nothing reaches, would go unnoticed."""
    checked = set().union(*(recorder.checked for recorder in recorders.values()))
    expected = {
        (module, name)
        for module, file in FILES.items()
        if module.startswith(MODULES) and module != "flaxcap.models.decoder"  # the interface
        for name in assigned_in(ast.parse(file.read_text()))
    }
    assert len(expected) > 100
    assert {f"{module}: {name}" for module, name in expected - checked} == set()


class Pair(NamedTuple):
    left_IP: Any
    right: Any


def lying(feats_IPF: Any, tokens_IC: Any) -> Any:
    swapped_PI = feats_IPF[..., 0]
    pairs = [Pair(feats_IPF, tokens_IC)]
    flat_1 = rows_IP2 = [feats_IPF[..., :2], tokens_IC]
    unknown_Q = tokens_IC[0]
    return swapped_PI, pairs, flat_1, rows_IP2, unknown_Q


def test_a_wrong_suffix_is_found():
    with Recorder((__name__,), {"I": {2}, "P": {3}, "F": {4}, "C": {5, 6}}) as recorder:
        lying(np.zeros((2, 3, 4)), np.zeros((2, 6)))
    assert {line.partition("lying: ")[2] for line in recorder.wrong} == {
        "swapped_PI has the suffix PI and the shape [2, 3]",
        "Pair: left_IP has the suffix IP and the shape [2, 3, 4]",
        "rows_IP2 has the suffix IP2 and the shape [2, 6]",
        "unknown_Q has the suffix Q and the shape [6]",
    }
    assert all(__name__ in line for line in recorder.wrong)
    assert (__name__, "tokens_IC") in recorder.checked


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_letter_is_in_the_glossary(module):
    suffixes = {name: suffix_of(name) for name in names_in(ast.parse(FILES[module].read_text()))}
    unknown = {name for name, suffix in suffixes.items() if {c for c in suffix if c.isalpha()} - set(glossary())}
    assert unknown == set()


def test_the_glossary_binds_every_letter_to_a_size():
    fields = {f"{part.name}.{f.name}" for part in dataclasses.fields(Config) for f in _fields_of(part)}
    assert set(glossary()) == set("ICBJPFDEHAGRSTVKMNLUYX")
    named = set()
    for meaning in glossary().values():
        assert "  " in meaning  # the meaning, and the size
        named |= {word.strip(",;") for word in meaning.split() if word.startswith(("model.", "train.", "decode."))}
    assert {word.partition("=")[0] for word in named} <= fields
    assert len(named) > 8


def _fields_of(part: Any) -> Any:
    default = getattr(Config(), part.name)
    return dataclasses.fields(default) if dataclasses.is_dataclass(default) else ()
