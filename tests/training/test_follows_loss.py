"""Runs whose CIDEr cannot rise follow the validation loss."""

import json

import pytest
from tiny_store import tiny_config, write_store

from flaxcap.commands.train import train
from flaxcap.config import ConfigError
from flaxcap.metrics import cider, ngrams, scorer
from flaxcap.text.vocabulary import SPECIAL, Vocabulary
from flaxcap.training import validation
from flaxcap.training.checkpoints import Checkpoints

VOCABULARY = Vocabulary([*SPECIAL, "a", "dog", "cat", "runs"])


@pytest.mark.parametrize(
    ("references", "rises"),
    [
        ([["a dog runs", "a cat"]], False),  # one image
        ([["a dog"], ["a dog", "a dog"]], False),  # the same captions of all images
        ([["a dog", "a cat"], ["a cat", "a dog"]], False),
        ([["a dog"], ["a cat"]], True),
        ([["a dog"], ["a dog", "dog a"]], True),  # only a pair of words tells them apart
        ([["a zebra"], ["a lynx"]], False),  # words that the model does not know
        ([["a zebra runs"], ["a lynx"]], True),
        ([["zebra"], ["lynx"]], False),
        ([["..."], ["a dog"]], True),
        ([["..."], ["!"]], False),
    ],
)
def test_cider_can_rise_where_words_of_the_vocabulary_tell_images_apart(references, rises):
    scored = scorer.Scorer(references)
    assert validation._can_rise(scored, references, VOCABULARY, 20) == rises
    # No caption of up to three words has a CIDEr above 0, or one has.
    words = ["", *VOCABULARY.tokens[4:]]
    captions = [f"{a} {b} {c}" for a in words for b in words for c in words]
    best = max(scored.cider(captions, [n] * len(captions)).max() for n in range(len(references)))
    assert (best > 0) == rises


def test_cider_is_informative_where_an_n_gram_is_absent_from_an_image():
    def informative(*references: list[str]) -> bool:
        return cider.Cider(ngrams.References([[text.split() for text in some] for some in references])).informative

    assert not informative(["a dog", "a cat"])
    assert not informative(["a dog"], ["a dog", "a dog"])
    assert informative(["a dog"], ["a dog", "dog a"])
    assert not informative([""], [""])


def log_of(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/loss" in line]


def test_a_run_with_one_validation_image_follows_the_loss(tmp_path, capsys):
    """Its CIDEr is 0, and it neither stops early nor keeps the first checkpoint. A resumed run decides alike."""
    config = tiny_config(epochs=4, stop_after=1, schedule="constant")
    write_store(tmp_path / "data", config, val=1)
    best = train(config, tmp_path / "run", tmp_path / "data")
    printed = capsys.readouterr().out
    assert "the CIDEr of the validation split is always 0, because it has one image: the best checkpoint, " in printed
    losses = [line["val/loss"] for line in log_of(tmp_path / "run")]
    assert [line["val/cider"] for line in log_of(tmp_path / "run")] == [0.0] * len(losses)
    rises = [n for n in range(1, len(losses)) if losses[n] >= min(losses[:n])]
    assert len(losses) == (rises[0] + 1 if rises else 4)
    assert len(losses) > 2
    assert best == pytest.approx(-min(losses))
    assert f"best validation loss {min(losses):.4f}" in printed
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    (lowest,) = [line["step"] for line in log_of(tmp_path / "run") if line["val/loss"] == min(losses)]
    assert checkpoints.best_step == lowest
    checkpoints.close()


def test_a_resumed_run_follows_the_loss_as_before(tmp_path, capsys):
    config = tiny_config(epochs=2, stop_after=3)
    write_store(tmp_path / "data", config, val=1)
    first = train(config, tmp_path / "run", tmp_path / "data")
    longer = tiny_config(epochs=3, stop_after=3)
    second = train(longer, tmp_path / "run", tmp_path / "data")
    losses = [line["val/loss"] for line in log_of(tmp_path / "run")]
    assert len(losses) == 3
    assert first == pytest.approx(-min(losses[:2]))
    assert second == pytest.approx(-min(losses))
    assert capsys.readouterr().out.count("follow the validation loss") == 2


def test_a_run_whose_cider_can_rise_follows_it(tmp_path, capsys):
    config = tiny_config(epochs=1)
    write_store(tmp_path / "data", config)
    assert train(config, tmp_path / "run", tmp_path / "data") == log_of(tmp_path / "run")[0]["val/cider"]
    printed = capsys.readouterr().out
    assert "follow the validation loss" not in printed
    assert "best validation CIDEr" in printed


def test_self_critical_training_is_refused_where_every_reward_is_0(tmp_path):
    config = tiny_config(epochs=0, cider_epochs=1, batch_images=8)
    write_store(tmp_path / "data", config, images=1)
    with pytest.raises(ConfigError, match=r"cider_epochs=1: found 1 training images whose captions are alike"):
        train(config, tmp_path / "run", tmp_path / "data")


def test_the_score_is_the_cider_or_minus_the_loss():
    found = {"loss": 2.0, "accuracy": 0.5, "cider": 0.25}
    scores = []
    for follows in (True, False):
        validate = object.__new__(validation.Validation)
        validate.follows_cider = follows
        scores.append(validate.score(found))
    assert scores == [0.25, -2.0]
