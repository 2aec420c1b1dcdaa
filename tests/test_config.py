"""Presets: loading, checking, comparing."""

import dataclasses
import json
import typing

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flaxcap import config as config_lib
from flaxcap.config import Config, ConfigError, check, leaves, nearest
from flaxcap.data import datasets
from flaxcap.encoders.inception_v3 import network
from flaxcap.errors import UserError
from flaxcap.presets import difference, from_dict, load, to_json

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
        ("data.vocab_size", 0, "more than 0"),
        ("data.shapes.num_train", 0, "more than 0"),
        ("data.shapes.num_val", -1, "more than 0"),
        ("data.shapes.num_test", -1, "0 or more"),
        ("encoder.image_size", 0, "more than 0"),
        ("encoder.batch_size", -1, "0 or more"),
        ("encoder.shard_images", 0, "more than 0"),
        ("model.image_dim", 0, "more than 0"),
        ("model.embedding_dim", -3, "more than 0"),
        ("model.attention_dim", 0, "more than 0"),
        ("model.hidden_dim", 0, "more than 0"),
        ("model.head_dim", 0, "more than 0"),
        ("train.batch_images", 0, "more than 0"),
        ("train.captions_per_image", 0, "more than 0"),
        ("train.epochs", 0, "more than 0"),
        ("train.learning_rate", 0.0, "more than 0"),
        ("train.learning_rate", float("nan"), "more than 0"),
        ("train.num_buckets", 0, "more than 0"),
        ("train.log_every", 0, "more than 0"),
        ("train.keep_latest", 0, "more than 0"),
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
        ("train.plateau_epochs", 0, "more than 0"),
        ("train.plateau_factor", 0.0, "more than 0"),
        ("train.plateau_factor", 1.5, "0 to 1"),
        ("train.cider_learning_rate", 0.0, "more than 0"),
        ("train.cider_temperature", 0.0, "more than 0"),
        ("train.scheduled_sampling", 1.1, "0 to 1"),
        ("train.scheduled_sampling", -0.1, "0 to 1"),
        ("train.label_smoothing", 1.0, "0 or more, and less than 1"),
        ("train.ema", 1.0, "0 or more, and less than 1"),
        ("train.ema", -0.5, "0 or more, and less than 1"),
        ("train.dropout.image", 0.995, "0 to 0.99"),
        ("train.dropout.embedding", -0.1, "0 to 0.99"),
        ("train.dropout.attention", 2.0, "0 to 0.99"),
        ("train.dropout.recurrent", 1.0, "0 to 0.99"),
        ("train.dropout.output", float("nan"), "0 to 0.99"),
        ("decode.top_p", 0.0, "more than 0"),
        ("decode.top_p", 1.01, "0 to 1"),
        ("decode.max_length", 0, "more than 0"),
        ("decode.temperature", 0.0, "more than 0"),
        ("decode.batch_size", 0, "more than 0"),
        ("decode.beam_width", 0, "more than 0"),
        ("decode.length_penalty", -0.1, "0 or more"),
        ("decode.no_repeat_ngram", -1, "0 or more"),
        ("decode.top_k", -1, "0 or more"),
        ("data.max_images", -1, "0 or more"),
        ("data.max_captions", -1, "0 or more"),
        ("data.max_length", 2, "3 or more"),
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
        (cls, field.name): field.metadata.get("choices") for cls in GROUPS.values() for field in dataclasses.fields(cls)
    }
    assert fields[Config, "dataset"] == datasets.NAMES
    assert fields[config_lib.Encoder, "block"] == network.BLOCKS


def test_every_field_has_a_help_and_a_place():
    found = leaves(Config())
    assert {"seed", "train.epochs", "data.shapes.num_train"} <= set(found)
    assert found["train.epochs"][0] == Config().train.epochs
    assert len(found) == sum(len(dataclasses.fields(cls)) for cls in GROUPS.values()) - len(GROUPS) + 1
    assert all(text for _, text in found.values())


def test_difference():
    old, new = Config(), changed(model__cell="lstm", train__epochs=3, data__shapes__seed=7, dataset="folder")
    assert difference(old, old, ["model", "data", "train", "dataset"]) == []
    assert difference(old, new, ["model"]) == ["model.cell was gru, is lstm"]
    assert difference(new, old, ["model", "encoder"]) == ["model.cell was lstm, is gru"]
    assert difference(old, new, ["train.epochs"]) == ["train.epochs was 20, is 3"]
    assert difference(old, new, ["train.epoch", "encoder"]) == []
    assert difference(old, new, ["data", "dataset"]) == [
        "dataset was coco_captions, is folder",
        "data.shapes.seed was 0, is 7",
    ]


def test_nearest_does_not_look_beyond_what_it_is_given():
    assert nearest("trian", ["prepare", "train"]) == "; did you mean 'train'?"
    assert nearest("train", []) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.epoch", "; did you mean 'train.epochs'?"),
        ("epochs", "; did you mean 'train.epochs'?"),
        ("model.epochs", "; did you mean 'train.epochs'?"),
        ("hiden_dim", "; did you mean 'model.hidden_dim'?"),
        ("zzzzzz", ""),
        ("", ""),
    ],
)
def test_nearest(name, expected):
    assert nearest(name, list(leaves(Config()))) == expected
