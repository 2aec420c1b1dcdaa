"""Fields of a preset: bounds, choices, and what they identify."""

import dataclasses

import pytest
from changed_config import changed

from flaxcap import config as config_lib
from flaxcap.config import Config, ConfigError, check, difference
from flaxcap.data import datasets
from flaxcap.fields import flatten

GROUPS = {name: cls for name, cls in vars(config_lib).items() if dataclasses.is_dataclass(cls)}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("data.vocab_size", 0, "1 or more"),
        ("data.shapes.num_train", 0, "1 or more"),
        ("data.shapes.num_val", -1, "1 or more"),
        ("data.shapes.num_test", -1, "0 or more"),
        ("encoder.image_size", -1, "0 to 4096"),
        ("encoder.image_size", 5000, "0 to 4096"),
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
        ("decode.min_length", -1, "0 to 9999"),
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
        ({"decode__min_length": 30}, "--config.decode.min_length=30 with max_length=30: expected less"),
        ({"train__epochs": 0}, "train.epochs=0 and cider_epochs=0: expected more than 0 of either"),
        ({"train__cider_epochs": 1, "train__captions_per_image": 1}, "captions_per_image=1: expected 2 or more"),
        (
            {"train__cider_epochs": 1, "train__finetune__block": "mixed9"},
            "--config.train.finetune.block=mixed9 with cider_epochs=1: expected one of the two in a run",
        ),
    ],
)
def test_incompatible_values(values, message):
    with pytest.raises(ConfigError) as error:
        check(changed(**values))
    assert message in str(error.value)


def test_compatible_values():
    check(changed(model__tied=True, model__embedding_dim=512))
    check(changed(train__cider_epochs=1, train__epochs=0, train__captions_per_image=2))


def test_the_least_values_are_allowed():
    least = {"data__max_length": 3, "data__vocab_size": 1, "encoder__batch_size": 0, "train__clip_norm": 0.0}
    check(changed(**least, data__test_split="", data__shapes__num_test=0, seed=2**32 - 1))


def test_the_data_sets_are_the_existing_ones():
    assert flatten(Config())["dataset"].rules.choices == datasets.NAMES


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
TEXT = {"data.tokenizer", "data.vocab_size", "data.max_length"}
WEIGHTS = {f"encoder.{name}" for name in ("name", "weights", "block", "image_size", "seed")}
TYPES = {"encoder.dtype", "encoder.store_dtype"}
STEPS = {f"train.{name}" for name in ("batch_images", "captions_per_image", "num_buckets", "steps_per_dispatch", "ema")}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("store", {"dataset"} | SPLITS | SHAPES | WEIGHTS | TYPES),
        ("model", MODEL | TEXT | WEIGHTS),
        ("run", {"dataset", "seed", "train.finetune.block"} | SPLITS | SHAPES | TEXT | WEIGHTS | TYPES | MODEL | STEPS),
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
