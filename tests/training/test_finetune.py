"""The encoder's last blocks, trained with the decoder: the same features at first, then better ones; the rest stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import succeed
from trained import Trained

from flaxcap.commands import evaluate
from flaxcap.config import Encoder, Finetune
from flaxcap.encoders.inception_v3 import network
from flaxcap.inference import captioner
from flaxcap.models.decoder import ENCODER
from flaxcap.training import finetune, logs

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def encoder() -> network.Params:
    return network.measure(network.init(jax.random.key(1), "mixed1"), IMAGES, "mixed1")


def test_split_and_unfolded_the_network_is_the_same(encoder):
    frozen, trained = finetune.split(encoder, "mixed1", "mixed1")
    assert set(frozen) | set(trained) == set(encoder)
    assert set(trained) == set(encoder) - set(network.kernel_shapes("mixed0"))
    assert set(finetune.split(encoder, "mixed0", "mixed1")[1]) == set(encoder) - set(network.kernels_before("mixed0"))
    encode = jax.jit(finetune.make_encode(Encoder(block="mixed1", image_size=96), Finetune("mixed1")))
    found = encode({ENCODER: trained}, frozen, IMAGES, None)
    expected = jax.jit(lambda p: network.apply(p, IMAGES, block="mixed1"))(network.fold(encoder))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))


def test_kernels_and_offsets_have_gradients_statistics_none(encoder):
    frozen, trained = finetune.split(encoder, "mixed1", "mixed1")
    encode = finetune.make_encode(Encoder(block="mixed1", image_size=96), Finetune("mixed1"))
    images = jnp.asarray(IMAGES)
    grads = jax.jit(jax.grad(lambda t: (encode({ENCODER: t}, frozen, images, None) ** 2).mean()))(trained)
    for layer in grads.values():
        assert jnp.abs(layer["kernel"]).max() > 0
        assert jnp.abs(layer["beta"]).max() > 0
        assert not layer["mean"].any()
        assert not layer["var"].any()


def test_pictures_are_cropped_and_mirrored_by_their_keys():
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
    # A part of the picture, at its whole size again: a ramp stays a ramp, less steep.
    ramp = jnp.broadcast_to(jnp.arange(96.0)[None, :, None], (96, 96, 3))
    steep = np.diff(np.asarray(finetune.augment(ramp, keys[1], Finetune(crop=0.5, flip=False)))[48, 2:-2, 0])
    np.testing.assert_allclose(steep, steep[0], atol=1e-3)
    assert 0.5 <= steep[0] <= 1


def test_a_second_stage_trains_the_encoder_and_is_exported_with_it(trained: Trained, tmp_path):
    # In a process of its own: without LLVM's optimisation a convolution's gradient takes minutes.
    fields = {"epochs": 1, "warmup_steps": 0, "dropout.output": 0.1}
    fields |= {"finetune.block": "mixed0", "finetune.learning_rate": 1e-3}
    preset = [f"--config={trained.preset}", *(f"--config.train.{name}={value}" for name, value in fields.items())]
    places = [f"--data_dir={trained.data_dir}", f"--workdir={tmp_path}/run", f"--init_from={trained.workdir}"]
    succeed("train", *preset, *places)
    (validated,) = (line for line in logs.read(tmp_path / "run") if "epoch" in line)
    assert np.isfinite([validated["val/loss"], validated["val/cider"]]).all()
    before = captioner.load(workdir=trained.workdir, data_dir=trained.data_dir)
    after = captioner.load(workdir=tmp_path / "run", data_dir=trained.data_dir)
    changed = {
        name for name in before.encoder if (before.encoder[name]["kernel"] != after.encoder[name]["kernel"]).any()
    }
    assert changed == set(before.encoder) - set(network.kernels_before("mixed0"))
    for name in changed:
        np.testing.assert_array_equal(before.encoder[name]["mean"], after.encoder[name]["mean"])
    assert ENCODER not in after.params
    assert after.about["encoder_sha256"] != before.about["encoder_sha256"]
    captioner.write(after, tmp_path / "export")
    found = captioner.load(model_dir=tmp_path / "export")
    np.testing.assert_array_equal(found.encoder["conv2d_6"]["kernel"], after.encoder["conv2d_6"]["kernel"])
    # The store's features are another encoder's: the pictures are encoded anew.
    scores = evaluate.evaluate(found, trained.data_dir, "val", tmp_path / "scores").scores
    assert "loss" not in scores
    assert scores["CIDEr"] >= 0
