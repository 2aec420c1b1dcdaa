"""An encoder defined here alone passes through prepare, train, evaluate, caption, export, bench and fine-tuning."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from trained import tiny_config

from flaxcap import presets
from flaxcap.commands.main import main
from flaxcap.config import Encoder
from flaxcap.encoders import base
from flaxcap.features import store
from flaxcap.images.preprocess import Preprocess
from flaxcap.inference import loading, plots
from flaxcap.training import logs

pytestmark = pytest.mark.usefixtures("without_java")


class ColourGrid:
    """Mean colours, their deviations and edge energies of the cells of a 3x4 grid, mixed by two layers."""

    name, positions, features = "colour_grid", 12, 8
    grid: tuple[int, int] | None = (3, 4)
    stages: tuple[str, ...] = ("mix", "scale")
    preprocess = Preprocess(size=48, crop=0.9, resample="bicubic")

    def __init__(self, config: Encoder):
        self._seed = config.seed

    def load(self, weights: str, sample: base.Sample | None = None) -> tuple[base.Params, str]:
        draw = np.random.default_rng(self._seed if weights == "random" else [1, 2, 3])
        params = {
            "mix": {"kernel": (np.eye(8) + 0.2 * draw.standard_normal((8, 8))).astype(np.float32)},
            "scale": {"kernel": 2 * np.eye(8, dtype=np.float32)},
        }
        if weights == "random" and sample is not None:
            feats_IPF = self.apply(params, jnp.asarray(sample()), jnp.float32)
            params["scale"]["kernel"] = np.asarray(jnp.diag(2 / feats_IPF.std((0, 1))))
        return params, base.digest(params)

    def abstract_params(self) -> base.Params:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.load("imagenet")[0])

    def inference_params(self, params: base.Params, *, platform: str, dtype: Any, many: bool) -> base.Params:
        return params

    def split(self, params: base.Params, first: str) -> tuple[base.Params, base.Params]:
        before = self.stages[: self.stages.index(first)]
        return {k: params[k] for k in before}, {k: params[k] for k in params if k not in before}

    def apply(self, params: base.Params, images_IYX3: jax.Array, dtype: Any) -> jax.Array:
        x = base.normalise(images_IYX3, self.preprocess, dtype).reshape(-1, 3, 16, 4, 12, 3)
        edges = [jnp.abs(jnp.diff(x, axis=axis)).mean((2, 4, 5)) for axis in (2, 4)]
        found = jnp.concatenate([x.mean((2, 4)), x.std((2, 4)), jnp.stack(edges, -1)], -1)
        for layer in self.stages:
            found = found @ jnp.asarray(params[layer]["kernel"], dtype)
        return found.reshape(-1, 12, 8)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    base.register("colour_grid", ColourGrid)
    yield
    del base._ENCODERS["colour_grid"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Returns a directory with a preset of the encoder, an image, prepared features, and a trained run."""
    path = tmp_path_factory.mktemp("toy")
    config = tiny_config()
    config.encoder = Encoder("colour_grid", weights="random", batch_size=8, shard_images=20)
    config.model.positions = True
    (path / "preset.json").write_text(presets.to_json(config))
    patches = np.random.default_rng(0).integers(0, 256, (3, 6, 3), np.uint8)
    Image.fromarray(patches).resize((96, 48), Image.Resampling.NEAREST).save(path / "image.png")
    preset, data = f"--config={path / 'preset.json'}", f"--data_dir={path / 'data'}"
    assert main(["prepare", preset, data]) == 0
    assert main(["train", preset, data, f"--workdir={path / 'run'}"]) == 0
    return path


def test_the_store_has_the_encoders_sizes(directory):
    config = presets.load(str(directory / "preset.json"))
    prepared = store.Store.finished(directory / "data", config)
    assert prepared.path.name.startswith("shapes-colour_grid-random-")
    assert (prepared.positions, prepared.feature_dim, prepared.positions_vary) == (12, 8, False)
    assert prepared.split("train").shape == (32, 12, 8)
    assert prepared.manifest["encoder"]["name"] == "colour_grid"
    assert prepared.manifest["encoder"]["preprocessing"]["crop"] == 0.9


def test_it_is_evaluated_captioned_and_exported(directory, capsys, monkeypatch):
    data, run = f"--data_dir={directory / 'data'}", f"--workdir={directory / 'run'}"
    model, image = f"--model={directory / 'export'}", str(directory / "image.png")
    assert main(["evaluate", data, run, "--split=test"]) == 0
    of_run = json.loads((directory / "run" / "test" / "scores.json").read_text())["scores"]
    assert main(["export", data, run, f"--out={directory / 'export'}"]) == 0
    assert main(["evaluate", data, model, "--split=test", f"--out_dir={directory / 'scores'}"]) == 0
    assert json.loads((directory / "scores" / "scores.json").read_text())["scores"] == of_run
    assert "loss" in of_run

    drawn, draw = [], plots.attention_plot

    def spy(image, text, words, alpha_TP, path, grid, crop):
        drawn.append((np.shape(alpha_TP), grid, crop))
        draw(image, text, words, alpha_TP, path, grid, crop)

    monkeypatch.setattr(plots, "attention_plot", spy)
    capsys.readouterr()
    plot = ["--plot", f"--out_dir={directory / 'plots'}"]
    assert main(["caption", image, data, run, *plot]) == 0
    found = capsys.readouterr().out
    assert found.startswith(f"{image}: ")
    assert "(log-probability -" in found
    words = len(found.splitlines()[0].removeprefix(f"{image}: ").partition("  (")[0].split())
    assert drawn == [((words, 12), (3, 4), 0.9)]
    with Image.open(directory / "plots" / "0000-image.png") as plotted:
        plotted.load()
    assert main(["caption", image, model, *plot]) == 0
    assert capsys.readouterr().out == found
    monkeypatch.setattr(ColourGrid, "grid", None)
    assert main(["caption", image, model, *plot]) == 0
    assert capsys.readouterr().out == found
    assert drawn[-1] == ((words, 12), None, 0.9)


def test_attention_depends_on_the_image_and_sums_to_1(directory):
    captioner = loading.load_run(directory / "run", directory / "data")
    draw = np.random.default_rng(1)
    one, other = (captioner.caption(draw.integers(0, 256, (50, 70, 3), np.uint8)) for _ in range(2))
    for found in (one, other):
        assert found.attention.shape == (len(found.words), 12)
        np.testing.assert_allclose(found.attention.sum(1), 1, atol=1e-5)
    assert np.abs(one.attention[0] - other.attention[0]).max() > 1e-6
    assert one.log_prob != other.log_prob


def test_pretrained_weights_are_prepared_beside_random_ones(directory):
    preset, data = f"--config={directory / 'preset.json'}", f"--data_dir={directory / 'data'}"
    assert main(["prepare", preset, data, "--config.encoder.weights=imagenet"]) == 0
    assert len(list((directory / "data" / "features").glob("shapes-colour_grid-*"))) == 2


@pytest.mark.parametrize(("first", "changed"), [("mix", {"mix", "scale"}), ("scale", {"scale"})])
def test_it_is_fine_tuned(directory, first, changed, capsys):
    preset, data = f"--config={directory / 'preset.json'}", f"--data_dir={directory / 'data'}"
    run = directory / f"tuned-{first}"
    fields = {"epochs": 1, "warmup_steps": 0, "finetune.block": first, "finetune.learning_rate": 1e-2}
    more = [f"--config.train.{name}={value}" for name, value in fields.items()]
    assert main(["train", preset, data, f"--workdir={run}", f"--init_from={directory / 'run'}", *more]) == 0
    assert np.isfinite([line["val/loss"] for line in logs.read(run) if "epoch" in line]).all()
    before = loading.load_run(directory / "run", directory / "data").encoder_params
    after = loading.load_run(run, directory / "data").encoder_params
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert {name for name, layer in different.items() if any(layer.values())} == changed
    assert main(["export", data, f"--workdir={run}", f"--out={run / 'export'}"]) == 0
    capsys.readouterr()
    assert main(["caption", str(directory / "image.png"), f"--model={run / 'export'}"]) == 0
    assert "log-probability" in capsys.readouterr().out


def test_an_unknown_stage_is_refused_with_the_encoders_stages(directory, capsys):
    preset, data = f"--config={directory / 'preset.json'}", f"--data_dir={directory / 'data'}"
    given = [f"--workdir={directory / 'never'}", f"--init_from={directory / 'run'}"]
    assert main(["train", preset, data, *given, "--config.train.finetune.block=mixed10"]) == 1
    assert "--config.train.finetune.block=mixed10: expected one of mix, scale" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "rate"), [("extract", "images_s"), ("train", "captions_s"), ("decode", "captions_s")])
def test_it_is_benchmarked(directory, what, rate, capsys):
    sizes = ["--images=32", "--steps=2", "--repeats=1", "--warmup=1", "--config.train.batch_images=16"]
    assert main(["bench", what, f"--config={directory / 'preset.json'}", *sizes]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result[rate] > 0
    assert result["config"]["encoder"]["name"] == "colour_grid"


def test_an_unknown_encoder_is_refused_with_a_hint(directory, capsys):
    preset, data = f"--config={directory / 'preset.json'}", f"--data_dir={directory / 'data'}"
    assert main(["prepare", preset, data, "--config.encoder.name=color_grid"]) == 1
    message = (
        "encoder.name=color_grid: expected one of imported, inception_v3, colour_grid; did you mean 'colour_grid'?"
    )
    assert message in capsys.readouterr().err
