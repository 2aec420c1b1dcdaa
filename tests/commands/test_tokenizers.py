"""Captions without spaces between words: trained, validated, evaluated and exported."""

import json

import pytest
from tiny_store import WORDS, tiny_config, write_store

from flaxcap.commands import evaluate, train
from flaxcap.features.store import StoreError
from flaxcap.inference import export, loading

pytestmark = pytest.mark.usefixtures("without_java")

HAN = dict(zip(WORDS, "一狗猫跑睡上下这垫桌红蓝大小", strict=True))


def chinese(caption: str) -> str:
    return "".join(HAN[word] for word in caption.split()) + "。"


def test_a_tokenizer_travels_with_the_model(tmp_path, capsys):
    config = tiny_config(epochs=8, cider_epochs=1, learning_rate=3e-2)
    config.data.tokenizer = "bpe"
    stored = write_store(tmp_path / "data", config, text=chinese).vocabulary()
    assert stored.tokenizer_name == "bpe"
    best = train.train(config, tmp_path / "run", tmp_path / "data")
    assert best > 0.1
    assert "CIDEr counts characters" in capsys.readouterr().out

    captioner = loading.load(tmp_path / "run", data_dir=tmp_path / "data")
    found = evaluate.evaluate(captioner, tmp_path / "data", "test", tmp_path / "scores")
    assert found.unit == json.loads((tmp_path / "scores" / "scores.json").read_text())["unit"] == "characters"
    assert found.scores["CIDEr"] > 0.1
    texts = [record["caption"] for record in json.loads((tmp_path / "scores" / "predictions.json").read_text())]
    assert all(texts)
    assert set("".join(texts)) <= set(HAN.values())

    export.write(captioner, tmp_path / "export")
    exported = loading.load(tmp_path / "export")
    for vocabulary in (captioner.vocabulary, exported.vocabulary):
        assert vocabulary.to_json() == stored.to_json()
        assert vocabulary.encode(chinese("a dog"), 9) == stored.encode(chinese("a dog"), 9)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    config = tiny_config()
    write_store(tmp_path, config)
    config.data.tokenizer = "characters"
    with pytest.raises(StoreError, match=r"made with --config\.data\.tokenizer=words, expected characters; run"):
        train.train(config, tmp_path / "run", tmp_path)


def test_a_file_of_captions_is_scored_by_character(tmp_path):
    config = tiny_config()
    rows = write_store(tmp_path, config, text=chinese).split("test").rows
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps([{"image_id": row.image_id, "caption": row.captions[0]} for row in rows]))
    found = evaluate.evaluate_file(file, config, tmp_path, "test", tmp_path / "scores")
    assert found.unit == "characters"
    assert found.scores["Bleu_1"] == pytest.approx(1)
    assert "unit" in (tmp_path / "scores" / "scores.json").read_text()
