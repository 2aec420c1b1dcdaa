"""Presets: loading, checking, comparing."""

import dataclasses
import json
import typing

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flaxcap import config as config_lib
from flaxcap.config import Config, ConfigError, check, difference
from flaxcap.data import datasets
from flaxcap.encoders.inception_v3 import network
from flaxcap.errors import UserError
from flaxcap.fields import flatten
from flaxcap.presets import from_dict, load, override, to_json

PRESETS = sorted(f for f in (ROOT / "experiments").glob("*.py") if "def get_config" in f.read_text())
GROUPS = {name: cls for name, cls in vars(config_lib).items() if dataclasses.is_dataclass(cls)}


def changed(**values) -> Config:
    """The default preset with fields such as `train__epochs` set."""
    config = Config()
    for name, value in values.items():
        *groups, field = name.split("__")
        node = config
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, field)
        setattr(node, field, value)
    return config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_is_sound_and_survives_json(path, tmp_path):
    config = load(str(path))
    assert check(config) is config
    assert path.read_text().startswith('"""'), "it says what it is for"
    (tmp_path / "config.json").write_text(to_json(config))
    assert load(str(tmp_path / "config.json")) == config
    assert load(str(path)) is not config


def test_the_default_is_a_preset_for_newcomers():
    assert (ROOT / "experiments" / "shapes.py") in PRESETS
    shown = load(str(ROOT / "experiments" / "shapes.py"))
    assert (shown.dataset, shown.encoder.weights) == ("shapes", "random")


@st.composite
def configs(draw, cls=Config):
    kinds = {int: st.integers(), str: st.text(), bool: st.booleans(), float: st.floats(allow_nan=False)}
    hints = typing.get_type_hints(cls)
    return cls(**{name: draw(kinds[hint] if hint in kinds else configs(hint)) for name, hint in hints.items()})


@given(configs())
def test_json_round_trip(config):
    assert from_dict(json.loads(to_json(config)), "config.json") == config


def test_what_json_leaves_out_is_the_default():
    assert from_dict({}, "x") == Config()
    assert from_dict({"train": {"clip_norm": 3}}, "x") == changed(train__clip_norm=3.0)
    assert type(from_dict({"train": {"clip_norm": 3}}, "x").train.clip_norm) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"seed": 1', "not JSON"),
        ("\0\1", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "found list, expected an object"),
        ("null", "found NoneType, expected an object"),
        ('{"sed": 1}', "unknown field 'sed'; did you mean 'seed'?"),
        ('{"train": {"epoch": 1}}', "train: unknown field 'epoch'; did you mean 'epochs'?"),
        ('{"data": {"shapes": {"num_tests": 1}}}', "data: shapes: unknown field 'num_tests'; did you mean 'num_test'?"),
        ('{"qqq": 1}', "unknown field 'qqq'"),
        ('{"train": 3}', "train: found int, expected an object"),
        ('{"seed": "1"}', "seed is '1', expected int"),
        ('{"seed": true}', "seed is True, expected int"),
        ('{"seed": 1.0}', "seed is 1.0, expected int"),
        ('{"seed": null}', "seed is None, expected int"),
        ('{"dataset": ["coco"]}', "dataset is ['coco'], expected str"),
        ('{"model": {"positions": 1}}', "model: positions is 1, expected bool"),
        ('{"train": {"learning_rate": "fast"}}', "train: learning_rate is 'fast', expected float"),
        ('{"train": {"learning_rate": 1%s}}' % ("0" * 400), "expected float"),
    ],
)
def test_a_bad_json_preset_is_explained(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(str(file))
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no get_config()"),
        ("def get_config(", "SyntaxError"),
        ("import flaxcap.no_such_module", "no_such_module"),
        ("def get_config():\n  return {}", "get_config() gave dict, not flaxcap.config.Config"),
        ("def get_config():\n  return 1 / 0", "division by zero"),
        (
            "from flaxcap.config import *\ndef get_config():\n  return Config(train=Train(epoch=3))",
            "did you mean 'train.epochs'?",
        ),
        (
            "from flaxcap.config import *\ndef get_config():\n  return Config(train=Train(epochs='3'))",
            "train: epochs is '3', expected int",
        ),
        ("from flaxcap.config import *\ndef get_config():\n  return Config(train=None)", "found NoneType"),
    ],
)
def test_a_bad_python_preset_is_explained(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(str(file))
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_a_file_that_is_no_preset(tmp_path):
    missing = str(tmp_path / "mine.py")
    with pytest.raises(ConfigError, match=r"mine\.py: no such file; presets are experiments/NAME\.py"):
        load(missing)
    for name in ("mine.yaml", "mine"):
        (tmp_path / name).write_text("epochs: 3")
        with pytest.raises(ConfigError, match=rf"{name}: a preset is a \.py or a \.json file"):
            load(str(tmp_path / name))
    (tmp_path / "directory.json").mkdir()
    with pytest.raises(ConfigError, match=r"directory\.json"):
        load(str(tmp_path / "directory.json"))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("data.vocab_size", 0, "1 or more"),
        ("data.shapes.num_train", 0, "1 or more"),
        ("data.shapes.num_val", -1, "1 or more"),
        ("data.shapes.num_test", -1, "0 or more"),
        ("encoder.image_size", 0, "1 to 4096"),
        ("encoder.batch_size", -1, "0 to 65536"),
        ("encoder.shard_images", 0, "1 or more"),
        ("model.image_dim", 0, "1 to 65536"),
        ("model.embedding_dim", -3, "1 to 65536"),
        ("model.attention_dim", 0, "1 to 65536"),
        ("model.hidden_dim", 0, "1 to 65536"),
        ("model.head_dim", 0, "1 to 65536"),
        ("train.batch_images", 0, "1 or more"),
        ("train.captions_per_image", 0, "1 or more"),
        ("train.epochs", 0, "more than 0"),
        ("train.learning_rate", 0.0, "more than 0"),
        ("train.learning_rate", float("nan"), "more than 0"),
        ("train.learning_rate", 1e-31, "more than 0"),
        ("train.learning_rate", float("inf"), "a finite number"),
        ("train.clip_norm", float("inf"), "a finite number"),
        ("train.batch_images", 2**31, "at most 2147483647"),
        ("train.num_buckets", 0, "1 or more"),
        ("train.log_every", 0, "1 or more"),
        ("train.keep_latest", 0, "1 or more"),
        ("train.warmup_steps", -1, "0 or more"),
        ("train.clip_norm", -1.0, "0 or more"),
        ("train.checkpoint_every", -1, "0 or more"),
        ("train.epochs", -1, "0 or more"),
        ("train.cider_epochs", -1, "0 or more"),
        ("train.stop_after", -1, "0 or more"),
        ("train.weight_decay", -0.1, "0 or more"),
        ("train.doubly_stochastic", -1.0, "0 or more"),
        ("train.hard_reward", -1.0, "0 or more"),
        ("train.hard_entropy", float("nan"), "0 or more"),
        ("train.plateau_epochs", 0, "1 or more"),
        ("train.plateau_factor", 0.0, "more than 0"),
        ("train.plateau_factor", 1.5, "more than 0 and at most 1"),
        ("train.cider_learning_rate", 0.0, "more than 0"),
        ("train.cider_temperature", 0.0, "more than 0"),
        ("train.scheduled_sampling", 1.1, "0 to 1"),
        ("train.scheduled_sampling", -0.1, "0 to 1"),
        ("train.label_smoothing", 1.0, "0 or more and less than 1"),
        ("train.ema", 1.0, "0 or more and less than 1"),
        ("train.ema", -0.5, "0 or more and less than 1"),
        ("train.dropout.image", 0.995, "0 to 0.99"),
        ("train.dropout.embedding", -0.1, "0 to 0.99"),
        ("train.dropout.attention", 2.0, "0 to 0.99"),
        ("train.dropout.recurrent", 1.0, "0 to 0.99"),
        ("train.dropout.output", float("nan"), "0 to 0.99"),
        ("decode.top_p", 0.0, "more than 0"),
        ("decode.top_p", 1.01, "more than 0 and at most 1"),
        ("decode.max_length", 0, "1 to 10000"),
        ("decode.temperature", 0.0, "more than 0"),
        ("decode.batch_size", 0, "1 to 65536"),
        ("decode.beam_width", 0, "1 to 1000"),
        ("decode.length_penalty", -0.1, "0 or more"),
        ("decode.no_repeat_ngram", -1, "0 or more"),
        ("decode.top_k", -1, "0 or more"),
        ("data.max_images", -1, "0 or more"),
        ("data.max_captions", -1, "0 or more"),
        ("data.max_length", 2, "3 to 10000"),
        ("data.train_split", "", "the name of a split"),
        ("data.val_split", "", "the name of a split"),
        ("seed", -1, "0 to 4294967295"),
        ("encoder.seed", 2**32, "0 to 4294967295"),
        ("data.shapes.seed", -1, "0 to 4294967295"),
        ("dataset", "coco", "one of coco_captions, flickr8k, folder, shapes"),
        ("dataset", "flickr", "shapes; did you mean 'flickr8k'?"),
        ("encoder.block", "mixed11", "mixed10; did you mean 'mixed1"),
        ("encoder.dtype", "float16", "one of float32, bfloat16; did you mean 'bfloat16'?"),
        ("encoder.store_dtype", "int8", "one of float32, bfloat16"),
        ("model.cell", "GRU", "one of gru, lstm"),
        ("model.initial_state", "zero", "one of zeros, mean; did you mean 'zeros'?"),
        ("model.attention", "firm", "one of soft, hard"),
        ("model.output", "deeper", "one of state, deep; did you mean 'deep'?"),
        ("train.schedule", "cosin", "one of cosine, constant, plateau; did you mean 'cosine'?"),
        ("train.dtype", "", "one of float32, bfloat16"),
        ("train.features", "disk", "one of auto, device, stream"),
        ("decode.method", "beams", "one of greedy, sample, beam; did you mean 'beam'?"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError) as error:
        check(changed(**{field.replace(".", "__"): value}))
    assert str(error.value).startswith(f"--config.{field}")
    assert str(value) in str(error.value)
    assert "expected " in str(error.value)
    assert expected in str(error.value).partition("expected ")[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__tied": True, "model__embedding_dim": 7}, "model.tied: embedding_dim=7 and head_dim=512 are expected"),
        ({"train__epochs": 0}, "train.epochs=0 and cider_epochs=0: expected more than 0 of either"),
        ({"train__cider_epochs": 1, "train__captions_per_image": 1}, "captions_per_image=1: expected 2 or more"),
        (
            {"train__cider_epochs": 1, "train__finetune__block": "mixed9"},
            "--config.train.finetune.block=mixed9 with cider_epochs=1: expected one of the two in a run",
        ),
    ],
)
def test_values_that_do_not_go_together(values, message):
    with pytest.raises(ConfigError) as error:
        check(changed(**values))
    assert message in str(error.value)


def test_values_that_do():
    check(changed(model__tied=True, model__embedding_dim=512))
    check(changed(train__cider_epochs=1, train__epochs=0, train__captions_per_image=2))


def test_the_least_values_are_allowed():
    least = {"data__max_length": 3, "data__vocab_size": 1, "encoder__batch_size": 0, "train__clip_norm": 0.0}
    check(changed(**least, data__test_split="", data__shapes__num_test=0, seed=2**32 - 1))


def test_choices_are_what_there_is():
    fields = {
        (cls, field.name): field.metadata["rules"].choices
        for cls in GROUPS.values()
        for field in dataclasses.fields(cls)
    }
    assert fields[Config, "dataset"] == datasets.NAMES
    assert fields[config_lib.Encoder, "block"] == network.BLOCKS


def test_every_field_has_a_help_and_every_number_a_lower_bound():
    found = flatten(Config())
    assert {"seed", "train.epochs", "data.shapes.num_train"} <= set(found)
    assert found["train.epochs"].value == Config().train.epochs
    assert len(found) == sum(len(dataclasses.fields(cls)) for cls in GROUPS.values()) - len(GROUPS) + 1
    for field in found.values():
        assert field.rules.help
        assert type(field.value) is field.type
        assert (field.type in (int, float)) == (field.rules.least is not None or field.rules.above is not None)


MODEL = {f"model.{field.name}" for field in dataclasses.fields(config_lib.Model)}
SHAPES = {f"data.shapes.{field.name}" for field in dataclasses.fields(config_lib.Shapes)}
SPLITS = {f"data.{name}" for name in ("train_split", "val_split", "test_split", "max_images", "max_captions")}
TEXT = {"data.vocab_size", "data.max_length"}
WEIGHTS = {"encoder.weights", "encoder.block", "encoder.image_size", "encoder.seed"}
TYPES = {"encoder.dtype", "encoder.store_dtype"}
STEPS = {f"train.{name}" for name in ("batch_images", "captions_per_image", "num_buckets", "steps_per_dispatch", "ema")}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("store", {"dataset"} | SPLITS | SHAPES | WEIGHTS | TYPES),
        ("model", MODEL | TEXT | WEIGHTS),
        ("run", {"dataset", "seed", "encoder.batch_size", "encoder.shard_images"}
         | SPLITS | SHAPES | TEXT | WEIGHTS | TYPES | MODEL | STEPS),
    ],
)  # fmt: skip
def test_identity(what, expected):
    config = changed(model__cell="lstm")
    found = config_lib.identity(config, what)
    assert set(found) == expected
    assert all(value == flatten(config)[name].value for name, value in found.items())


def test_difference():
    old, new = Config(), changed(model__cell="lstm", train__epochs=3, data__shapes__seed=7, dataset="folder")
    assert difference(old, old, "run") == []
    assert difference(old, new, "model") == ["model.cell was gru, is lstm"]
    assert difference(new, old, "model") == ["model.cell was lstm, is gru"]
    stored = ["dataset was coco_captions, is folder", "data.shapes.seed was 0, is 7"]
    assert difference(old, new, "store") == stored
    assert difference(old, new, "run") == [*stored, "model.cell was gru, is lstm"]


# ---- overrides


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("--config.train.epochs=3", "train.epochs", 3),
        ("-config.train.epochs=3", "train.epochs", 3),
        ("--config.train.epochs=0x10", "train.epochs", 16),
        ("--config.train.epochs=1_000", "train.epochs", 1000),
        ("--config.train.learning_rate=1", "train.learning_rate", 1.0),
        ("--config.train.learning_rate=5e-4", "train.learning_rate", 5e-4),
        ("--config.model.positions", "model.positions", True),
        ("--config.model.positions=true", "model.positions", True),
        ("--config.model.positions=1", "model.positions", True),
        ("--config.train.finetune.flip=False", "train.finetune.flip", False),
        ("--config.train.finetune.flip=0", "train.finetune.flip", False),
        ("--config.model.embeddings=a=b c", "model.embeddings", "a=b c"),
        ("--config.model.embeddings='x'", "model.embeddings", "'x'"),
        ("--config.model.embeddings=1", "model.embeddings", "1"),
        ("--config.data.test_split=", "data.test_split", ""),
    ],
)
def test_an_override_is_parsed_by_its_fields_type(argument, field, value):
    config = Config()
    found = override(config, [argument], "train")
    assert config == Config()
    assert found == changed(**{field.replace(".", "__"): value})
    assert type(flatten(found)[field].value) is type(value)


def test_the_last_override_of_a_field_counts_and_the_preset_is_checked_at_the_end():
    assert override(Config(), ["--config.seed=3", "--config.seed=4"], "train").seed == 4
    found = override(Config(), ["--config.model.tied", "--config.model.embedding_dim=512"], "train")
    assert (found.model.tied, found.model.embedding_dim) == (True, 512)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.epochs=1e3", "--config.train.epochs=1e3: expected a whole number"),
        ("--config.train.epochs=true", "--config.train.epochs=true: expected a whole number"),
        ("--config.train.learning_rate=", "--config.train.learning_rate=: expected a number"),
        ("--config.train.learning_rate=1/2", "--config.train.learning_rate=1/2: expected a number"),
        ("--config.train.learning_rate", "expected --config.train.learning_rate=VALUE, where VALUE is a number"),
        ("--config.model.tied=yes", "--config.model.tied=yes: expected true or false"),
        ("--config.model.tied=", "--config.model.tied=: expected true or false"),
        ("--config.train.epochs=99999999999999999999", "epochs=99999999999999999999: expected at most 2147483647"),
        ("--config.dropout=1", "--config.dropout: no such field (`flaxcap train --help` lists them)"),
        ("--config.train.dropout=1", "it is a group, as in 'train.dropout.image'"),
        ("--config.train.epochs.x=3", "--config.train.epochs.x: no such field"),
        ("--config.=3", "--config.: no such field"),
        ("--config.", "--config.: no such field"),
    ],
)
def test_a_bad_override_is_explained(argument, message):
    with pytest.raises(ConfigError) as error:
        override(Config(), [argument], "train", "p.json")
    assert message in str(error.value)
    assert not str(error.value).startswith("p.json")


def test_an_error_in_a_field_without_an_override_names_the_file():
    with pytest.raises(ConfigError, match=r"^p\.json: --config\.seed=-1: expected 0 to"):
        override(changed(seed=-1), ["--config.train.epochs=3"], "train", "p.json")
    with pytest.raises(ConfigError, match=r"^--config\.seed=-1: expected 0 to"):
        override(changed(seed=-1), ["--config.train.epochs=3"], "train")
