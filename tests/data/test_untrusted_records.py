"""Captions, presets, vocabularies and numbers from untrusted sources: read in bounded memory, or refused by name."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from torture_cases import records as torture_records

from flaxcap import presets
from flaxcap.commands.main import main
from flaxcap.config import Config, ConfigError, check
from flaxcap.data import datasets
from flaxcap.data.base import DataError, Examples
from flaxcap.errors import listed, plain, quoted, shown
from flaxcap.features import npy_maps
from flaxcap.features.shards import StoreError
from flaxcap.files import size_limits
from flaxcap.models import word_vectors
from flaxcap.models.word_vectors import EmbeddingsError
from flaxcap.text.vocabulary import SPECIAL, Vocabulary, VocabularyError

# Messages


def test_untrusted_text_in_a_message_is_harmless():
    bad = "a\x1b[2J\r\n\x9b1m\u202e\u2028\ud83d"
    for found in (plain(bad), shown(bad), quoted(bad), listed([bad])):
        assert found.encode()
        assert not set(found) & set("\x1b\r\n\x9b\u202e\u2028")
    assert plain("naïve 👩🏽‍🚒 שלום\u200d") == "naïve 👩🏽‍🚒 שלום\u200d"
    assert len(shown("x" * 10**6)) == len(quoted("x" * 10**6)) == 80
    assert len(listed(["x" * 100] * 1000)) == 300
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    assert "too deep to show" in shown(deep)
    assert "too deep to show" in quoted(deep)


# Records


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("images")
    torture_records.write_images(folder)
    return folder


@given(torture_records.files)
def test_captions_are_read_or_their_error_names_file_record_and_field(images, file):
    assert torture_records.judge_file(images, file) == ""


@given(torture_records.presets_())
def test_the_error_of_a_bad_preset_names_its_field(tmp_path_factory, preset):
    assert torture_records.judge_preset(tmp_path_factory.getbasetemp() / "preset.json", preset) == ""


@given(torture_records.vocabularies)
def test_vocabularies_are_read_or_their_error_names_them(content):
    assert torture_records.judge_vocabulary(content) == ""


@given(torture_records.results)
def test_predictions_are_read_or_their_error_names_them(tmp_path_factory, content):
    assert torture_records.judge_results(tmp_path_factory.getbasetemp() / "results.json", content) == ""


def test_hard_captions_pass_through_tfds_records(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "folder")
    captions = [text for text in torture_records.HARD if text.strip()]
    record = {"image": "a.jpg", "captions": captions}
    (folder / "captions.jsonl").write_text(json.dumps(record) + '\n{"image": "é.gif", "caption": "a"}\n')
    builder = datasets.prepare("folder", tmp_path / "data", manual_dir=folder)
    found = {e.filename: e.captions for split in builder.info.splits for e in Examples(builder, split)}
    assert found == {"a.jpg": tuple(text.strip() for text in captions), "é.gif": ("a",)}


@pytest.mark.parametrize(
    ("tree", "override", "message"),
    [
        (
            {"decode": {"max_length": 10**12}},
            "",
            "p.json: --config.decode.max_length=1000000000000: expected 1 to",
        ),
        ({"model": {"hidden_dim": 10**9}}, "", "p.json: --config.model.hidden_dim=1000000000: expected 1 to 65536"),
        ({"train": {"weight_decay": float("inf")}}, "", "p.json: --config.train.weight_decay=inf: expected a finite"),
        ({"seed": -1}, "train.epochs=3", "p.json: --config.seed=-1: expected 0 to"),
        ({}, "seed=-1", "prepare: --config.seed=-1: expected 0 to"),
        ({"\x1b[2J": 1}, "", r"unknown field '\x1b[2J'"),
    ],
)
def test_the_error_of_a_bad_value_names_its_file(tree, override, message, tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps({"dataset": "shapes"} | tree))
    overrides = [f"--config.{override}"] if override else []
    assert main(["prepare", f"--config={tmp_path / 'p.json'}", f"--data_dir={tmp_path}", *overrides]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert plain(error.rstrip("\n")) == error.rstrip("\n")


@pytest.mark.parametrize("word", ["", "a b", "a\nb", "\x1b[2J", "\x9b1m", "\t"])
def test_a_vocabulary_holds_words_only(word):
    text = Vocabulary([*SPECIAL, "dog", word]).to_json()  # with a correct hash
    with pytest.raises(VocabularyError, match=r"^v\.json: not a vocabulary: found '.*', expected a word"):
        Vocabulary.from_json(text, "v.json")


def test_files_of_words_and_numbers_are_read_up_to_their_limit(tmp_path, monkeypatch):
    file = tmp_path / "vectors.txt"
    file.write_bytes(b"dog 1 2\n" + b"x" * (1 << 20))
    with pytest.raises(EmbeddingsError, match=r"vectors\.txt: line 2: expected a word and its numbers \(1048576 bytes"):
        word_vectors.read(file, Vocabulary([*SPECIAL, "dog"]), 2)
    (tmp_path / "p.json").write_bytes(b" " * (size_limits.PRESET + 1))
    with pytest.raises(ConfigError, match=r"p\.json: cannot be read \(more than the 1048576 bytes allowed"):
        presets.load(str(tmp_path / "p.json"))
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,x\n")
    monkeypatch.setattr(size_limits, "CAPTIONS", 10)
    with pytest.raises(DataError, match=r"captions\.csv: cannot be read: more than the 10 bytes allowed"):
        datasets.prepare("folder", tmp_path / "data", manual_dir=tmp_path)


def test_a_feature_map_with_a_huge_header_takes_no_memory(tmp_path):
    with (tmp_path / "a.jpg.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (64, 10**15)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(StoreError, match=r"a\.jpg\.npy: not a NumPy array"):
        npy_maps.read_npy(epath.Path(tmp_path), "a.jpg")
    (tmp_path / "a.jpg.npy").write_bytes(b"\x93NUMPY\x01\0\x06\0((((((")
    with pytest.raises(StoreError, match=r"a\.jpg\.npy: not a NumPy array"):
        npy_maps.read_npy(epath.Path(tmp_path), "a.jpg")


def test_images_of_a_folder_are_read_up_to_their_limit(images, tmp_path, monkeypatch):
    folder = shutil.copytree(images, tmp_path / "folder")
    (folder / "captions.csv").write_text("image,caption\na.jpg,x\né.gif,y\n")
    (folder / "a.jpg").write_bytes(bytes(10_000))
    monkeypatch.setattr(size_limits, "IMAGE", 5000)
    builder = datasets.prepare("folder", tmp_path / "data", manual_dir=folder)
    found = {e.filename: e.image for split in builder.info.splits for e in Examples(builder, split)}
    assert {name: len(image) for name, image in found.items()} == {
        "a.jpg": 5001,
        "é.gif": (folder / "é.gif").stat().st_size,
    }


def test_defaults_are_within_their_own_bounds():
    assert check(Config())
