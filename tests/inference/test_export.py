"""An export is complete, and a damaged one is refused with the name of its file."""

import ast
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from trained import Trained

from flaxcap import presets
from flaxcap.decoding import generate
from flaxcap.errors import UserError
from flaxcap.files.params import CheckpointError, load_params
from flaxcap.inference import export, loading
from flaxcap.inference.captioner import Captioner
from flaxcap.text.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def captioner(trained: Trained) -> Captioner:
    return loading.load_run(trained.workdir, trained.data_dir)


@pytest.fixture(scope="module")
def exported(captioner, tmp_path_factory) -> pathlib.Path:
    """Returns an export that tests only read."""
    path = tmp_path_factory.mktemp("export") / "made" / "here"
    export.write(captioner, path)
    return path


@pytest.fixture
def copy(exported, tmp_path) -> pathlib.Path:
    """Returns an export that a test may damage."""
    return shutil.copytree(exported, tmp_path / "copy")


def edit(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)


def test_a_loaded_export_equals_the_captioner_bit_for_bit(captioner, exported):
    found = loading.load_export(exported)
    assert equal(found.params, jax.device_get(captioner.params))
    assert equal(found.encoder_params, captioner.encoder_params)
    assert found.encoder.name == captioner.encoder.name
    assert found.config == captioner.config
    assert found.vocabulary.tokens == captioner.vocabulary.tokens
    assert found.about.items() > captioner.about.items()
    assert found.about["step"] == captioner.about["step"]
    feats_IPF = jax.random.normal(jax.random.key(0), (4, 64, 256))
    key = jax.random.key(0)
    drawn = [dataclasses.replace(c.config.decode, method="sample") for c in (captioner, found)]
    runs = [(c, generate.Generator(c.bind, options)) for c, options in zip((captioner, found), drawn, strict=True)]
    captions = [run(run.freeze(c.params), feats_IPF, key) for c, run in runs]
    assert equal(*captions)
    assert len(np.unique(captions[0].tokens_IT)) > 5


ELSEWHERE = """
import sys
from flaxcap.commands import caption
from flaxcap.inference import export, loading
captioner = loading.load(sys.argv[1])
for found in caption.caption(captioner, caption.from_sources(sys.argv[2:])):
    assert not found.reason, found.reason
    print([found.caption, found.log_prob.hex()])
"""


def test_an_export_needs_neither_the_run_nor_the_data(trained: Trained, tmp_path):
    """Two processes with one device: one exports a run and captions; the other one captions from the moved export."""
    here = tmp_path / "here"
    for path in (trained.data_dir, trained.workdir):
        shutil.copytree(path, here / path.name)
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(pictures):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (99, 77, 3), np.uint8)).save(path)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def python(code: str, *args) -> str:
        command = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout

    loaded = f"loading.load({str(here / 'run')!r}, data_dir={str(here / 'data')!r})"
    in_run = ELSEWHERE.replace("loading.load(sys.argv[1])", f"{loaded}\nexport.write(captioner, sys.argv[1])")
    expected = python(in_run, here / "export", *pictures)
    elsewhere = tmp_path / "elsewhere" / "model"
    elsewhere.parent.mkdir()
    (here / "export").rename(elsewhere)
    shutil.rmtree(here)
    assert python(ELSEWHERE, elsewhere, *pictures) == expected
    captions = [ast.literal_eval(line)[0] for line in expected.splitlines()]
    assert len(captions) == 3
    assert all(captions)


def test_no_file_is_a_pickle(exported):
    files = [file for file in exported.rglob("*") if file.is_file()]
    assert {file.name for file in exported.iterdir()} == {
        "config.json",
        "vocabulary.json",
        "about.json",
        "decoder",
        "encoder",
    }
    assert len(files) > 10
    for file in files:
        assert "pickle" not in file.name
        assert file.suffix not in (".pkl", ".pickle", ".pt", ".npy")
        assert not file.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


@pytest.mark.parametrize("there", ["an export", "another file", "a file itself"])
def test_an_export_overwrites_nothing(there, captioner, tmp_path, copy):
    out = copy if there == "an export" else tmp_path / "out"
    if there == "another file":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif there == "a file itself":
        out.write_text("mine")
    before = {file: file.read_bytes() for file in [out, *out.rglob("*")] if file.is_file()}
    with pytest.raises(CheckpointError, match=f"--out={out}: not empty; an export goes to a new directory"):
        export.write(captioner, out)
    assert {file: file.read_bytes() for file in [out, *out.rglob("*")] if file.is_file()} == before


def test_an_export_may_go_to_an_empty_directory(captioner, tmp_path):
    export.write(captioner, tmp_path)
    assert loading.load_export(tmp_path).about["step"] == captioner.about["step"]


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "about.json", "decoder", "encoder"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_part_is_named(copy, name, damage):
    target = copy / name
    if target.is_dir() and damage == "missing":
        shutil.rmtree(target)
    else:
        file = target if target.is_file() else max(target.rglob("d/*"), key=lambda f: f.stat().st_size)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
        if damage == "missing":
            file.unlink()
    with pytest.raises(UserError) as error:
        loading.load_export(copy)
    assert str(error.value).startswith(str(copy))
    assert name in str(error.value)
    if damage == "missing":
        assert isinstance(error.value, CheckpointError)


def test_a_flipped_bit_in_any_file_of_parameters_is_found(copy):
    files = [file for part in ("decoder", "encoder") for file in (copy / part).rglob("*") if file.is_file()]
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([*(b ^ 1 for b in whole[middle : middle + 1])]) + whole[middle + 1 :])
        if whole:
            with pytest.raises(CheckpointError, match=f"{file.name}: (damaged|missing, or not as it was written)"):
                loading.load_export(copy)
        file.write_bytes(whole)
    loading.load_export(copy)


def test_another_vocabulary_is_refused(copy):
    file = copy / "vocabulary.json"
    words = list(Vocabulary.from_json(file.read_text(), "").tokens)
    words[-1], words[-2] = words[-2], words[-1]
    file.write_text(Vocabulary(words).to_json())
    with pytest.raises(CheckpointError, match=r"vocabulary\.json: not the vocabulary that the model was trained with"):
        loading.load_export(copy)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        loading.load_export(copy)


def test_a_config_of_another_model_is_refused(copy):
    file = copy / "config.json"
    config = presets.load(str(file))
    for group, field, value, message in (
        (
            "model",
            "hidden_dim",
            33,
            r"decoder: 6 parameters .*: cell/context/kernel has shape \(16, 96\), expected .*99",
        ),
        ("model", "cell", "lstm", r"decoder: \d+ parameters do not fit the preset: cell/context/kernel has shape"),
        (
            "model",
            "attention_gate",
            True,
            r"decoder: 2 parameters do not fit the preset: cell/gate/bias has shape none",
        ),
        ("encoder", "block", "mixed1", r"encoder: .* has shape none \(it is missing\), expected \("),
        ("encoder", "block", "mixed99", r"encoder\.block=mixed99: expected one of"),
    ):
        tree = json.loads(presets.to_json(config))
        tree[group][field] = value
        file.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=message):
            loading.load_export(copy)


def test_parameters_of_another_shape_are_refused(captioner, tmp_path):
    params = jax.device_get(captioner.params) | {"head": {"bias": np.zeros(32), "kernel": np.zeros((32, 31))}}
    export.write(dataclasses.replace(captioner, params=params), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"1 param.*head/kernel has shape \(32, 31\), expected \(32, 32\)"):
        loading.load_export(tmp_path / "a")
    name = next(iter(captioner.encoder_params))
    encoder_params = {k: v for k, v in captioner.encoder_params.items() if k != name}
    export.write(dataclasses.replace(captioner, encoder_params=encoder_params), tmp_path / "b")
    with pytest.raises(CheckpointError, match=rf"encoder: 4 parameters .*: {name}/beta has shape none"):
        loading.load_export(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessing": "cropped"}, r"about\.json: found preprocessing 'cropped', expected {'decoding': "),
        ({"feature_dim": "wide"}, "cannot be read"),
        ({"feature_dim": 2048}, r"image/kernel has shape \(256, 16\), expected \(2048, 16\)"),
        ({"positions": 63}, r"about\.json: found 63 positions of 256 features, expected 64 of 256"),
        ({"files": 3}, "cannot be read"),
        ({"vocabulary_sha256": None}, "not the vocabulary"),
    ],
)
def test_another_preprocessing_or_origin_is_refused(copy, changes, message):
    edit(copy / "about.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        loading.load_export(copy)


def test_an_ensemble_of_a_model_with_itself_captions_like_the_model(captioner, exported, trained: Trained):
    ensemble = loading.load_ensemble(
        workdirs=[trained.workdir], model_dirs=[exported, exported], data_dir=trained.data_dir
    )
    assert len(ensemble.others) == 2
    image = np.random.default_rng(0).integers(0, 256, (99, 77, 3), np.uint8)
    one, three = captioner.caption(image), ensemble.caption(image)
    assert one.text == three.text
    assert one.log_prob == pytest.approx(three.log_prob, abs=1e-3)
    np.testing.assert_allclose(one.attention, three.attention, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("encoder", "inception_v3-mixed9"), ("encoder_sha256", "0" * 64), ("vocabulary_sha256", None)]
)
def test_an_ensemble_of_different_encoders_or_vocabularies_is_refused(copy, exported, monkeypatch, name, value):
    """The blocks mixed9 and mixed10 have equal sizes and one file of weights."""
    about = json.loads((copy / "about.json").read_text())
    load = loading.load_export

    def load_changed(path):
        found = load(path)
        return dataclasses.replace(found, about=about | {name: value}) if path == copy else found

    monkeypatch.setattr(loading, "load_export", load_changed)
    with pytest.raises(CheckpointError, match=rf"{copy}: no ensemble with {exported}: found {name} {value}, expected"):
        loading.load_ensemble(model_dirs=[exported, copy])


def test_a_directory_without_a_model_is_named(tmp_path, trained: Trained):
    with pytest.raises(CheckpointError, match="no model is named: give --workdir=RUN or --model=EXPORT"):
        loading.load_ensemble()
    for read in (
        lambda: loading.load(tmp_path),
        lambda: loading.load_run(tmp_path, trained.data_dir),
        lambda: loading.load_export(tmp_path / "nothere"),
    ):
        with pytest.raises(CheckpointError, match=r"no config\.json: neither a run nor an export"):
            read()
    shutil.copy(trained.workdir / "config.json", tmp_path)
    shutil.copy(trained.workdir / "vocabulary.json", tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint yet; `flaxcap train` writes them"):
        loading.load_run(tmp_path, trained.data_dir)
    with pytest.raises(CheckpointError, match="nothere: no parameters"):
        load_params(tmp_path / "nothere")
