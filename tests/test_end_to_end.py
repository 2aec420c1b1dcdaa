"""Every command in a process of its own, as a user runs it: on `shapes`, COCO-like zips, photographs."""

import json
import shutil

from coco_sample import write_coco_zips
from command import succeed
from PIL import Image

from flaxcap.training import logs


def test_shapes_the_default_job_and_its_captions_are_true(tmp_path):
    """The preset as `./launch.sh` runs it: at least 80% of the held-out captions are true of their picture."""
    data, run = tmp_path / "data", tmp_path / "run"
    preset = ["--config=experiments/shapes.py", f"--data_dir={data}"]
    assert "prepared: " in succeed("prepare", *preset)
    assert "best validation CIDEr" in succeed("train", *preset, f"--workdir={run}")
    succeed("evaluate", f"--workdir={run}", f"--data_dir={data}", "--split=test")

    scores = json.loads((run / "test" / "scores.json").read_text())["scores"]
    predictions = json.loads((run / "test" / "predictions.json").read_text())
    assert len({p["image_id"] for p in predictions}) == len(predictions) == 300
    print(scores)
    assert scores["true"] >= 0.8
    assert scores["true_swapped"] < 0.1
    assert scores["CIDEr"] > 2 * scores["CIDEr_swapped"]

    out = succeed(
        "caption", f"--workdir={run}", f"--data_dir={data}", "--split=test", "--num_images=2", "--plot",
        f"--out_dir={tmp_path / 'captions'}",
    )  # fmt: skip
    first = out.splitlines()[0]
    assert predictions[0]["caption"] in first
    assert "log-probability -" in first
    for plot in sorted((tmp_path / "captions").iterdir()):
        assert str(plot) in out
        with Image.open(plot) as image:
            assert image.width > 300

    succeed("export", f"--workdir={run}", f"--data_dir={data}", f"--out={tmp_path / 'exported'}")
    shutil.rmtree(data)
    shutil.rmtree(run)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (200, 100), "gray").save(picture)
    assert f"{picture}: " in succeed("caption", picture, f"--model={tmp_path / 'exported'}")


def test_coco_layout(tmp_path):
    """The COCO preset on zips of COCO's layout, with a random early block in the place of downloaded weights."""
    (tmp_path / "zips").mkdir()
    write_coco_zips(tmp_path / "zips", n_train=12, n_restval=6, n_val=5, n_test=5)
    smaller = ["--config.encoder.weights=random", "--config.encoder.block=mixed0", "--config.encoder.image_size=96"]
    preset = ["--config=experiments/coco.py", *smaller, f"--data_dir={tmp_path / 'data'}"]
    out = succeed("prepare", *preset, f"--manual_dir={tmp_path / 'zips'}")
    assert "train: 18 images with features" in out  # train+restval
    run = tmp_path / "run"
    epochs = ["--config.train.epochs=1", "--config.train.cider_epochs=1"]
    options = [*epochs, "--config.train.batch_images=4", f"--workdir={run}"]
    succeed("train", *preset, *options, devices=2)
    assert [line["epoch"] for line in logs.read(run) if "epoch" in line] == [1, 2]
    model = [f"--workdir={run}", f"--data_dir={tmp_path / 'data'}"]
    succeed("evaluate", *model, "--split=test")
    predictions = json.loads((run / "test" / "predictions.json").read_text())
    assert len(predictions) == 5
    assert all(isinstance(p["image_id"], int) and isinstance(p["caption"], str) for p in predictions)
    exported = tmp_path / "exported"
    succeed("export", *model, f"--out={exported}")
    one = succeed("caption", *model, "--split=test", "--num_images=2").splitlines()
    two = succeed("caption", f"--model={exported}", f"--data_dir={tmp_path / 'data'}", "--split=test", "--num_images=2")
    assert one == two.splitlines()


def test_photographs(tmp_path, flickr_dir, inception_h5):
    """Flickr8k's preset with real weights at an early block, on a few photographs: the loss falls, words come."""
    preset = ["--config=experiments/flickr8k.py", f"--data_dir={tmp_path / 'data'}", "--config.data.max_images=40"]
    preset += ["--config.encoder.block=mixed2", "--config.train.batch_images=8", "--config.train.warmup_steps=5"]
    preset += ["--config.train.learning_rate=1e-3"]  # the preset's is too much for 15 steps: the loss would rise
    succeed("prepare", *preset, f"--manual_dir={flickr_dir}", f"--encoder_weights={inception_h5}")
    run = tmp_path / "run"
    epochs = ["--config.train.epochs=3", "--config.train.cider_epochs=1"]
    succeed("train", *preset, *epochs, f"--workdir={run}")
    lines = logs.read(run)
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < losses[0]
    rates = [line["train/learning_rate"] for line in lines if "train/cider_d" in line]
    assert 0 < rates[-1] < 1e-4  # of the second stage, from 2e-4 down
    photograph = sorted((flickr_dir / "Images").iterdir())[0]
    out = succeed("caption", photograph, f"--workdir={run}", f"--data_dir={tmp_path / 'data'}")
    assert out.startswith(f"{photograph}: a ")
