"""Presets: loading, saving, and overrides on the command line."""

import json
import typing

import pytest
from changed_config import changed
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.config import Config, ConfigError, check
from flaxcap.errors import UserError
from flaxcap.fields import flatten
from flaxcap.presets import from_dict, load, override, to_json

PRESETS = sorted(f for f in (ROOT / "experiments").glob("*.py") if "def get_config" in f.read_text())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_is_valid_and_survives_json(path, tmp_path):
    config = load(str(path))
    assert check(config) is config
    assert path.read_text().startswith('"""'), "a docstring states its purpose"
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


def test_fields_that_json_omits_have_defaults():
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
        ("--config.model.tied=False", "model.tied", False),
        ("--config.model.tied=0", "model.tied", False),
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


CONDITIONAL = {name: field.only for name, field in flatten(Config()).items() if field.only}


def test_fields_of_other_methods_are_declared():
    """Every field of a group has the group's conditions."""
    of_method = {name: str(only[-1]) for name, only in CONDITIONAL.items() if name.startswith("decode.")}
    assert of_method == {
        **dict.fromkeys(("decode.temperature", "decode.top_k", "decode.top_p"), "decode.method=sample"),
        **dict.fromkeys(("decode.beam_width", "decode.length_penalty"), "decode.method=beam"),
    }
    shapes = [name for name in flatten(Config()) if name.startswith("data.shapes.")]
    assert shapes
    assert {tuple(map(str, CONDITIONAL[name])) for name in shapes} == {("dataset=shapes",)}
    assert list(map(str, CONDITIONAL["train.hard_reward"])) == ["train.epochs", "model.attention=hard"]
    assert str(CONDITIONAL["train.cider_temperature"][0]) == "train.cider_epochs"


@pytest.mark.parametrize("name", CONDITIONAL)
def test_an_override_without_effect_is_refused(name):
    """The preset itself may hold such a field. The override is accepted once the other field has the needed value."""
    names = {condition.name for condition in CONDITIONAL[name]}
    needed = {
        condition.name: condition.value or ("mixed10" if condition.name == "train.finetune.block" else "1")
        for condition in CONDITIONAL[name]
    }
    other = {
        "decode.method": "greedy", "dataset": "folder", "encoder.weights": "imagenet", "train.schedule": "cosine",
        "model.attention": "soft", "train.cider_epochs": "0", "train.epochs": "0", "train.finetune.block": "",
    }  # fmt: skip
    value = flatten(Config())[name].value
    mine = f"--config.{name}={value}"
    # Without epochs a run is self-critical.
    base = changed(train__cider_epochs=1) if "train.epochs" in names else Config()
    met = [f"--config.{field}={text}" for field, text in needed.items()]
    assert flatten(override(base, [mine, *met], "train", "p.json"))[name].value == value
    for field in needed:
        unmet = [*met, f"--config.{field}={other[field]}"]
        with pytest.raises(ConfigError) as error:
            override(base, [mine, *unmet], "train", "p.json")
        found = other[field] or "''"
        wanted = CONDITIONAL[name][list(needed).index(field)]
        assert str(error.value).startswith(f"{mine}: has no effect, found {field}={found}, expected {wanted}")
        assert flatten(override(base, unmet, "train"))[name].value == value  # from the preset: not refused


def test_the_error_of_an_override_without_effect_names_field_method_and_remedy():
    with pytest.raises(ConfigError) as error:
        override(Config(), ["--config.decode.beam_width=3"], "caption")
    assert str(error.value) == (
        "--config.decode.beam_width=3: has no effect, found decode.method=greedy, expected decode.method=beam;"
        " set --config.decode.method too, or leave --config.decode.beam_width out"
    )
    with pytest.raises(ConfigError, match=r"found decode\.method=beam, expected decode\.method=sample; set --config"):
        override(Config(), ["--config.decode.method=beam", "--config.decode.top_k=40"], "caption")
    with pytest.raises(ConfigError, match=r"found train\.cider_epochs=0, expected train\.cider_epochs to be set; set"):
        override(Config(), ["--config.train.cider_temperature=0.7"], "train")


def test_an_error_in_a_field_without_an_override_names_the_file():
    with pytest.raises(ConfigError, match=r"^p\.json: --config\.seed=-1: expected 0 to"):
        override(changed(seed=-1), ["--config.train.epochs=3"], "train", "p.json")
    with pytest.raises(ConfigError, match=r"^--config\.seed=-1: expected 0 to"):
        override(changed(seed=-1), ["--config.train.epochs=3"], "train")
