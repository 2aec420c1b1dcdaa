"""Fine-tuning starts with the features of the frozen encoder, then trains its last stages and no other parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import succeed
from trained import Trained

from flaxcap.commands import evaluate
from flaxcap.config import Encoder, Finetune
from flaxcap.encoders import base
from flaxcap.encoders.inception_v3 import network
from flaxcap.inference import export, loading
from flaxcap.models.decoder import ENCODER
from flaxcap.training import finetune, logs

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)
CONFIG = Encoder(block="mixed1", image_size=96)


@pytest.fixture(scope="module")
def encoder() -> base.ImageEncoder:
    return base.make(CONFIG)


@pytest.fixture(scope="module")
def params(encoder) -> base.Params:
    return encoder.load("random", lambda: IMAGES)[0]


def test_the_split_encoder_gives_the_same_features(encoder, params):
    frozen, trained = encoder.split(params, "mixed1")
    assert set(frozen) | set(trained) == set(params)
    assert set(trained) == set(params) - set(network.kernel_shapes("mixed0"))
    assert set(encoder.split(params, "mixed0")[1]) == set(params) - set(network.kernels_before("mixed0"))
    encode = jax.jit(finetune.make_encode(encoder, CONFIG, Finetune("mixed1")))
    found = encode({ENCODER: trained}, frozen, IMAGES, None)
    inference = encoder.inference_params(params, platform="cpu", dtype=jnp.float32, many=False)
    expected = jax.jit(encoder.apply, static_argnums=2)(inference, IMAGES, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))


def test_kernels_and_offsets_have_gradients_and_statistics_have_none(encoder, params):
    frozen, trained = encoder.split(params, "mixed1")
    encode = finetune.make_encode(encoder, CONFIG, Finetune("mixed1"))
    images = jnp.asarray(IMAGES)
    grads = jax.jit(jax.grad(lambda t: (encode({ENCODER: t}, frozen, images, None) ** 2).mean()))(trained)
    for layer in grads.values():
        assert jnp.abs(layer["kernel"]).max() > 0
        assert jnp.abs(layer["beta"]).max() > 0
        assert not layer["mean"].any()
        assert not layer["var"].any()


def test_images_are_cropped_and_flipped_by_their_keys():
    image = IMAGES[0].astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)

    def many(options: Finetune) -> np.ndarray:
        return np.asarray(jax.vmap(lambda key: finetune.augment(jnp.asarray(image), key, options))(keys))

    np.testing.assert_allclose(many(Finetune(crop=1.0, flip=False)), np.broadcast_to(image, (64, 96, 96, 3)), atol=0.01)
    mirrored = many(Finetune(crop=1.0, flip=True))
    whole, turned = (np.abs(mirrored - x).max((1, 2, 3)) < 0.01 for x in (image, image[:, ::-1]))
    assert (whole ^ turned).all()
    assert 16 < turned.sum() < 48
    cropped = many(Finetune(crop=0.5, flip=False))
    assert len({x.tobytes() for x in cropped}) == 64
    assert (cropped >= 0).all()
    assert (cropped <= 255).all()
    # A crop is resized to the complete size: a ramp stays a ramp, with a smaller slope.
    ramp = jnp.broadcast_to(jnp.arange(96.0)[None, :, None], (96, 96, 3))
    steep = np.diff(np.asarray(finetune.augment(ramp, keys[1], Finetune(crop=0.5, flip=False)))[48, 2:-2, 0])
    np.testing.assert_allclose(steep, steep[0], atol=1e-3)
    assert 0.5 <= steep[0] <= 1


def test_a_second_stage_trains_the_encoder_and_is_exported_with_it(trained: Trained, tmp_path):
    # A separate process: with the tests' XLA options a convolution's gradient takes minutes (jaxlib 0.10, CPU).
    fields = {"epochs": 1, "warmup_steps": 0, "dropout.output": 0.1}
    fields |= {"finetune.block": "mixed0", "finetune.learning_rate": 1e-3}
    preset = [f"--config={trained.preset}", *(f"--config.train.{name}={value}" for name, value in fields.items())]
    places = [f"--data_dir={trained.data_dir}", f"--workdir={tmp_path}/run", f"--init_from={trained.workdir}"]
    succeed("train", *preset, *places)
    (validated,) = (line for line in logs.read(tmp_path / "run") if "epoch" in line)
    assert np.isfinite([validated["val/loss"], validated["val/cider"]]).all()
    before = loading.load_run(trained.workdir, trained.data_dir)
    after = loading.load_run(tmp_path / "run", trained.data_dir)
    old, new = before.encoder_params, after.encoder_params
    assert old is not None
    assert new is not None
    changed = {name for name in old if (old[name]["kernel"] != new[name]["kernel"]).any()}
    assert changed == set(old) - set(network.kernels_before("mixed0"))
    for name in changed:
        np.testing.assert_array_equal(old[name]["mean"], new[name]["mean"])
    assert ENCODER not in after.params
    assert after.about["encoder_sha256"] != before.about["encoder_sha256"]
    export.write(after, tmp_path / "export")
    found = loading.load_export(tmp_path / "export")
    assert found.encoder_params is not None
    np.testing.assert_array_equal(found.encoder_params["conv2d_6"]["kernel"], new["conv2d_6"]["kernel"])
    # The store's features are those of another encoder, so the images are encoded again.
    scores = evaluate.evaluate(found, trained.data_dir, "val", tmp_path / "scores").scores
    assert "loss" not in scores
    assert scores["CIDEr"] >= 0
