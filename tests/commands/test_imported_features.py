"""Features of a network that flaxcap does not have: prepare, train, evaluate, export, and captions of new maps."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import flaxcap
from flaxcap import presets
from flaxcap.commands import caption, evaluate, main, train
from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, Data, Model, Train
from flaxcap.encoders.inception_v3 import weights
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.features.shards import StoreError
from flaxcap.files.params import CheckpointError
from flaxcap.inference import export, loading

pytestmark = pytest.mark.usefixtures("without_java")

POSITIONS, WIDTH = 5, 6
KINDS = ("dog", "house", "train")


def tiny() -> Config:
    return Config(
        dataset="folder",
        data=Data(vocab_size=20),
        model=Model(image_dim=8, embedding_dim=8, attention_dim=8, hidden_dim=16, head_dim=16),
        train=Train(batch_images=8, epochs=8, num_buckets=1, learning_rate=0.02, warmup_steps=5, log_every=5),
    )


def feature_map(kind: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((POSITIONS, WIDTH))
    return (0.1 * noise + 3 * np.eye(WIDTH)[kind]).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A directory with images, maps, the store and a run; nothing reads InceptionV3's weights."""
    root = tmp_path_factory.mktemp("imported")
    (root / "pictures").mkdir()
    (root / "maps").mkdir()
    lines = []
    for k in range(48):
        name, split = f"{k:02d}.png", "train" if k < 40 else "val" if k < 44 else "test"
        Image.new("RGB", (20, 16), (5 * k, 40, 90)).save(root / "pictures" / name)
        np.save(root / "maps" / f"{name}.npy", feature_map(k % 3, k))
        lines.append(json.dumps({"image": name, "caption": f"a {KINDS[k % 3]} here", "split": split}))
    (root / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load", lambda *_, **__: pytest.fail("InceptionV3's weights were read"))
        prepare(tiny(), root / "data", manual_dir=root / "pictures", npy_dir=root / "maps")
        train.train(tiny(), root / "run", root / "data")  # the preset does not say that the features are imported
    return root


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("InceptionV3's weights were read"))


def test_store_and_run_say_imported(trained):
    (path,) = (trained / "data" / "features").iterdir()
    assert path.name.startswith("folder-imported-")
    made_by = json.loads((path / "manifest.json").read_text())["encoder"]
    assert (made_by["name"], made_by["imported_from"]) == ("imported", str(trained / "maps"))
    assert loading.read_config(trained / "run").encoder.name == "imported"


@pytest.mark.parametrize("exported", [False, True])
def test_evaluate_reads_the_store(trained, tmp_path, exported):
    captioner = loading.load(trained / "run", data_dir=trained / "data")
    if exported:
        export.write(captioner, tmp_path / "export")
        captioner = loading.load(tmp_path / "export")
    report = evaluate.evaluate(captioner, trained / "data", "test", tmp_path / "scores")
    assert report.scores["CIDEr"] > 1
    assert report.scores["loss"] < 1


def test_other_features_are_not_evaluated(trained, tmp_path):
    """Two imports differ in their maps, and neither has weights."""
    captioner = loading.load(trained / "run", data_dir=trained / "data")
    with pytest.raises(UserError, match=r"found no features, or others; .* `flaxcap prepare --npy_dir=DIR`"):
        evaluate.evaluate(captioner, tmp_path / "empty", "test", tmp_path)
    (tmp_path / "maps").mkdir()
    for file in (trained / "maps").iterdir():
        np.save(tmp_path / "maps" / file.name, np.load(file) + 1)
    prepare(tiny(), tmp_path / "data", manual_dir=trained / "pictures", npy_dir=tmp_path / "maps")
    with pytest.raises(UserError, match="found no features, or others"):
        evaluate.evaluate(captioner, tmp_path / "data", "test", tmp_path)


def test_images_are_refused_and_maps_captioned(trained, tmp_path, capsys):
    image = trained / "pictures" / "01.png"
    source = [f"--workdir={trained / 'run'}", f"--data_dir={trained / 'data'}"]
    assert main.main(["caption", str(image), *source]) == 1
    error = capsys.readouterr().err
    assert f"5 positions of 6 features an image, imported from {trained / 'maps'};" in error
    assert "--npy_dir" in error

    (tmp_path / "new").mkdir()
    for kind in range(3):
        np.save(tmp_path / "new" / f"{kind}.jpg.npy", feature_map(kind, 100 + kind))
    np.save(tmp_path / "new" / "wide.jpg.npy", np.zeros((POSITIONS, WIDTH + 1), np.float32))
    names = [f"photos/{kind}.jpg" for kind in range(3)]
    captioner = flaxcap.load(trained / "run", data_dir=trained / "data")
    images = [(name, lambda: b"") for name in [*names, "missing.jpg", "wide.jpg"]]
    lines = list(caption.caption(captioner, images, npy_dir=tmp_path / "new"))
    assert [line.caption for line in lines[:3]] == [f"a {kind} here" for kind in KINDS]
    assert "missing.jpg.npy: not found" in lines[3].reason
    assert "found 5 positions of 7 features, expected 5 positions of 6 features" in lines[4].reason

    found = captioner.caption_features([feature_map(kind, 100 + kind) for kind in range(3)])
    assert [each.text for each in found] == [line.caption for line in lines[:3]]
    assert [each.log_prob for each in found] == pytest.approx([line.log_prob for line in lines[:3]], rel=1e-5)
    with pytest.raises(UserError, match=r"image 0: found features \[4, 6\], expected \[5, 6\]"):
        captioner.caption_features(np.zeros((1, POSITIONS - 1, WIDTH), np.float32))


def test_a_split_is_captioned_from_its_maps_with_plots(trained, tmp_path, capsys):
    source = [f"--workdir={trained / 'run'}", f"--data_dir={trained / 'data'}", "--split=test", "--num_images=2"]
    assert main.main(["caption", *source, "--plot", f"--out_dir={tmp_path}"]) == 0
    assert "44.png: a train here" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_preset_need_not_say_that_features_are_imported(trained, tmp_path, capsys):
    (tmp_path / "preset.json").write_text(presets.to_json(tiny()))
    source = [f"--workdir={trained / 'run'}", f"--data_dir={trained / 'data'}", f"--out_dir={tmp_path}"]
    assert main.main(["evaluate", *source, f"--config={tmp_path / 'preset.json'}"]) == 0
    assert "CIDEr" in capsys.readouterr().out


def test_an_export_says_where_its_features_come_from(trained, tmp_path):
    export.write(loading.load(trained / "run", data_dir=trained / "data"), tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps(about | {"positions": str(POSITIONS)}))
    assert loading.load(tmp_path).feature_shape == (POSITIONS, WIDTH, False)
    del about["imported_from"]
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"about\.json: cannot be read \(KeyError\('imported_from'\)\)"):
        loading.load(tmp_path)


def test_a_store_takes_no_maps_of_another_network(trained, tmp_path):
    data_dir, moved, others = tmp_path / "data", tmp_path / "moved", tmp_path / "others"
    shutil.copytree(trained / "data", data_dir)
    shutil.copytree(trained / "maps", moved)
    prepare(tiny(), data_dir, manual_dir=trained / "pictures", npy_dir=moved)
    others.mkdir()
    for file in moved.iterdir():
        np.save(others / file.name, np.load(file) + 1)
    message = rf"found features imported from {trained / 'maps'}, expected those of {others}; delete it, or choose"
    with pytest.raises(StoreError, match=message):
        prepare(tiny(), data_dir, manual_dir=trained / "pictures", npy_dir=others)


def test_computed_features_come_first(trained, tmp_path):
    config = tiny()
    assert store.resolve(trained / "data", config).encoder.name == "imported"
    assert store.resolve(tmp_path, config) is config
    computed = store.path_for(trained / "data", config)
    computed.mkdir()
    (computed / "manifest.json").write_text("{}")
    assert store.resolve(trained / "data", config) is config
    computed.rmtree()
