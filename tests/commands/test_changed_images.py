"""Changed images: `prepare` computes their features alone, and `train` reports them."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from flaxcap.commands import train
from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, ConfigError, Data, Encoder, Model, Train
from flaxcap.encoders import base as encoders
from flaxcap.features import extract
from flaxcap.features.store import Store
from flaxcap.files.params import load_params
from flaxcap.images import decode

SIZE, NUMBER = 83, 12


def tiny() -> Config:
    return Config(
        dataset="folder",
        data=Data(test_split="", vocab_size=20),
        encoder=Encoder(weights="random", block="mixed0", image_size=SIZE, store_dtype="float32", shard_images=4),
        model=Model(image_dim=8, embedding_dim=8, attention_dim=8, hidden_dim=8, head_dim=8),
        train=Train(batch_images=8, epochs=1, num_buckets=1),
    )


def picture(file: pathlib.Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 80)).save(file)


def describe(folder: pathlib.Path, names: list[str]) -> None:
    rows = [f"{name},a picture of {k % 3},{'val' if k < 2 else 'train'}" for k, name in enumerate(names)]
    (folder / "captions.csv").write_text("\n".join(["image,caption,split", *rows]))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [f"{k:02d}.png" for k in range(NUMBER)]
    for seed, name in enumerate(names):
        picture(folder / name, seed)
    describe(folder, names)
    return folder


@pytest.fixture
def data_dir(folder, tmp_path) -> pathlib.Path:
    prepare(tiny(), tmp_path / "data", manual_dir=folder)
    return tmp_path / "data"


def check(data_dir: pathlib.Path, folder: pathlib.Path, bad: tuple[str, ...] = ()) -> None:
    """Asserts that every image of the folder has its own features."""
    found, config = Store.finished(data_dir, tiny()), tiny()
    encoder = encoders.make(config.encoder)
    encode = extract.make_encode(encoder, load_params(found.path / "encoder"), config.encoder, many=False)
    seen = set()
    for role in found.roles:
        split = found.split(role)
        assert {s.filename for s in split.skipped()} == set(bad) & {row.filename for row in split.rows}
        for row in split.present():
            name = split.rows[row].filename
            seen.add(name)
            pixels = decode.to_square((folder / name).read_bytes(), SIZE)
            np.testing.assert_allclose(split.read([row])[0], encode(pixels[None])[0], rtol=1e-3, atol=1e-3)
    assert seen == {file.name for file in folder.glob("*.png")} - set(bad)
    assert not list(found.path.glob(".*.old*"))


def computed(capsys) -> dict[str, int]:
    """Returns the number of images whose features were computed, by split."""
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    return {line.split()[2].rstrip(":"): int(line.split()[3]) for line in lines}


def test_one_replaced_image_is_computed_alone(folder, data_dir, capsys):
    capsys.readouterr()
    picture(folder / "07.png", 100)
    prepare(tiny(), data_dir, manual_dir=folder)
    assert computed(capsys) == {"train": 1}
    check(data_dir, folder)


def test_images_that_come_go_and_change_names(folder, data_dir, capsys):
    capsys.readouterr()
    (folder / "03.png").rename(folder / "renamed.png")
    (folder / "04.png").unlink()
    picture(folder / "new.png", 101)
    describe(folder, sorted(file.name for file in folder.glob("*.png")))
    prepare(tiny(), data_dir, manual_dir=folder)
    assert computed(capsys)["train"] == 1
    check(data_dir, folder)


def test_other_captions_compute_nothing(folder, data_dir, capsys):
    capsys.readouterr()
    text = (folder / "captions.csv").read_text()
    (folder / "captions.csv").write_text(text.replace("a picture", "a photograph"))
    prepare(tiny(), data_dir, manual_dir=folder)
    assert computed(capsys) == {}
    assert "photograph" in Store.finished(data_dir, tiny()).vocabulary().ids
    check(data_dir, folder)


def test_all_replaced_images_are_computed(folder, data_dir, capsys):
    capsys.readouterr()
    for k in range(NUMBER):
        picture(folder / f"{k:02d}.png", 100 + k)
    prepare(tiny(), data_dir)  # the folder is where it was
    assert computed(capsys) == {"train": NUMBER - 2, "val": 2}
    check(data_dir, folder)


@pytest.mark.parametrize("allowed", [0.05, 0.5])
def test_a_damaged_image_that_is_replaced_gets_features(folder, tmp_path, allowed):
    sound = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(sound[:200])
    options = {"manual_dir": folder, "max_bad_fraction": allowed}
    if allowed < 0.1:
        with pytest.raises(extract.BadImagesError, match=r"05\.png: damaged"):
            prepare(tiny(), tmp_path / "data", **options)
    else:
        prepare(tiny(), tmp_path / "data", **options)
        check(tmp_path / "data", folder, bad=("05.png",))
    (folder / "05.png").write_bytes(sound)
    prepare(tiny(), tmp_path / "data", **options)
    check(tmp_path / "data", folder)


def test_a_skipped_image_is_tried_again(folder, tmp_path, monkeypatch, capsys):
    """A newer Pillow may read a format that an older one does not."""
    read = decode.for_encoder

    def older(image, preprocess):
        if image == (folder / "05.png").read_bytes():
            raise decode.ImageError("not an image")
        return read(image, preprocess)

    with monkeypatch.context() as patched:
        patched.setattr(decode, "for_encoder", older)
        prepare(tiny(), tmp_path, manual_dir=folder, max_bad_fraction=0.5)
    check(tmp_path, folder, bad=("05.png",))
    prepare(tiny(), tmp_path, manual_dir=folder)
    assert "05.png: was skipped (not an image), can be read now" in capsys.readouterr().out
    check(tmp_path, folder)


def test_train_reports_that_a_run_was_trained_on_other_images(folder, data_dir, tmp_path):
    train.train(tiny(), tmp_path / "run", data_dir)
    train.train(tiny(), tmp_path / "run", data_dir)  # nothing has changed
    picture(folder / "07.png", 100)
    prepare(tiny(), data_dir)
    with pytest.raises(ConfigError, match=r"holds a run that was trained on other images .* --init_from="):
        train.train(tiny(), tmp_path / "run", data_dir)
    train.train(tiny(), tmp_path / "again", data_dir, init_from=tmp_path / "run")


def test_fine_tuning_reads_the_images_of_the_store(folder, data_dir, tmp_path):
    picture(folder / "07.png", 100)
    config = tiny()
    config.train.finetune.block = "mixed0"
    with pytest.raises(ConfigError, match=r"found other images than those of .*; run `flaxcap prepare`"):
        train.train(config, tmp_path / "run", data_dir)
