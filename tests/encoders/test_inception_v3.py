"""InceptionV3: features equal Keras's, and each block accepts the images that it can use."""

import functools
import re

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.config import ConfigError, Encoder
from flaxcap.encoders import base
from flaxcap.encoders.inception_v3 import network, weights
from flaxcap.encoders.inception_v3.encoder import SIZE, InceptionV3
from flaxcap.images.preprocess import Preprocess

EARLY = "mixed3"


@functools.partial(jax.jit, static_argnames=("block", "dtype"))
def apply(params, images_IYX3, block="mixed10", dtype=jnp.float32):
    """Returns the features of pixels 0 to 255."""
    return network.apply(params, base.normalise(images_IYX3, Preprocess(images_IYX3.shape[1]), dtype), block=block)


def measure(params, images_IYX3, block="mixed10"):
    """Returns parameters measured on pixels 0 to 255."""
    return network.measure(params, base.normalise(images_IYX3, Preprocess(images_IYX3.shape[1]), np.float32), block)


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Returns smooth images that differ from each other, uint8 [count, size, size, 3]."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(0, 255, (count, 6, 6, 3))
    grid = np.linspace(0, 5, size)
    blend = np.maximum(0, 1 - np.abs(grid[:, None] - np.arange(6)))
    smooth = np.einsum("yp,xq,ipqc->iyxc", blend, blend, coarse)
    return np.clip(smooth + draw.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def pooled(grid_IYXF: np.ndarray) -> np.ndarray:
    """Returns adaptive average pooling to 8x8, computed bin by bin."""
    n = grid_IYXF.shape[1]
    bins = [slice(int(np.floor(i * n / 8)), int(np.ceil((i + 1) * n / 8))) for i in range(8)]
    rows = [np.stack([grid_IYXF[:, y, x].mean((1, 2)) for x in bins], 1) for y in bins]
    return np.stack(rows, 1).reshape(len(grid_IYXF), 64, -1)


@pytest.fixture(scope="module")
def images():
    return pictures(2, 299)


@pytest.fixture(scope="module")
def raw():
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def measured(raw, images):
    return measure(raw, images)


@pytest.fixture(scope="module")
def keras_model():
    import keras

    with jax.numpy_rank_promotion("allow"):
        model = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(299, 299, 3))  # pyright: ignore[reportArgumentType]
        return keras.Model(model.input, [model.get_layer(EARLY).output, model.output])


def numbered(model, kind):
    """Returns the model's layers of a kind, in the order in which Keras created them."""
    layers = [layer for layer in model.layers if re.fullmatch(kind + r"(_\d+)?", layer.name)]
    return sorted(layers, key=lambda layer: int((re.findall(r"_(\d+)$", layer.name) or [0])[0]))


def keras_features(model, images):
    """Returns Keras's grids for the early block and for mixed10."""
    with jax.numpy_rank_promotion("allow"):
        run = jax.jit(lambda x: model.stateless_call([v.value for v in trained], [v.value for v in others], x)[0])
        trained, others = model.trainable_variables, model.non_trainable_variables
        return [np.asarray(grid) for grid in run(images.astype(np.float32) / 127.5 - 1)]


def assert_parity(params, model, images):
    early, last = keras_features(model, images)
    for block, theirs in ((EARLY, pooled(early)), ("mixed10", last.reshape(len(images), 64, -1))):
        assert theirs.std() > 0.1
        encoder = InceptionV3(Encoder(block=block))
        for many in (False, True):
            layers = encoder.inference_params(params, platform="cpu", dtype=jnp.float32, many=many)
            assert any("points" in layer for layer in layers.values()) == many
            feats = jax.jit(encoder.apply, static_argnums=2)(layers, images, jnp.float32)
            error = np.abs(np.asarray(feats) - theirs).max()
            print(f"{block}, {many=}: {error:.1e} from Keras at most")
            assert error <= 1e-4


# Keras 3's HDF5 writer warns under NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_parity_with_keras_on_random_weights(keras_model, raw, images, tmp_path):
    from keras.src.legacy.saving import legacy_h5_format

    draw = np.random.default_rng(1)
    params = {}
    for name, conv in raw.items():  # a measured network amplifies rounding, in Keras too
        mean, beta = draw.normal(0, 0.1, (2, *conv["beta"].shape))
        params[name] = {**conv, "mean": mean, "beta": beta, "var": draw.uniform(0.5, 1.5, mean.shape)}
    convs, norms = numbered(keras_model, "conv2d"), numbered(keras_model, "batch_normalization")
    assert len(convs) == len(norms) == len(params) == 94
    for conv, norm, ours in zip(convs, norms, params.values(), strict=True):
        conv.set_weights([ours["kernel"]])
        norm.set_weights([ours["beta"], ours["mean"], ours["var"]])
    with h5py.File(tmp_path / "random.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, keras_model)
    assert_parity(weights.read(tmp_path / "random.h5"), keras_model, images)


def test_parity_with_keras_on_real_weights(keras_model, inception_h5, images):
    keras_model.load_weights(inception_h5)
    assert_parity(weights.read(inception_h5), keras_model, images)


def test_kernels_that_winograd_makes_faster_are_transformed(raw):
    transformed = network.transform(network.fold(raw))
    assert list(transformed) == list(raw)
    shapes = {name: raw[name]["kernel"].shape for name, layer in transformed.items() if "points" in layer}
    assert len(shapes) == 45
    assert {shape[:2] for shape in shapes.values()} == {(3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)}
    plain = {name: layer["kernel"].shape for name, layer in transformed.items() if "kernel" in layer}
    # Nine others are larger than 1x1. They have a stride, few channels or very many.
    assert sum(rows * columns > 1 for rows, columns, *_ in plain.values()) == 9
    early = {name: raw[name] for name in network.kernel_shapes("mixed0")}
    assert [name for name, layer in network.transform(network.fold(early)).items() if "points" in layer] == [
        *("conv2d_5", "conv2d_8", "conv2d_10", "conv2d_11")
    ]


def bfloat16_error(params, images, block):
    folded = network.fold(params)
    exact = np.asarray(apply(folded, images, block=block))
    rounded = apply(folded, images, block=block, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    return np.linalg.norm(np.asarray(rounded, np.float32) - exact) / np.linalg.norm(exact)


def test_bfloat16_stays_close_to_float32(raw, images):
    assert bfloat16_error(raw, images, "mixed10") < 0.03
    small = pictures(2, 139)
    measured = measure(network.init(jax.random.key(0), "mixed2"), small, "mixed2")
    assert bfloat16_error(measured, small, "mixed2") < 0.05


def test_bfloat16_stays_close_to_float32_on_real_weights(inception_h5, images):
    assert bfloat16_error(weights.read(inception_h5), images, "mixed10") < 0.06


def test_features_of_a_measured_random_network_differ_between_images(raw, measured, images):
    def similarity(feats):
        first, second = np.asarray(feats).reshape(2, -1)
        return first @ second / np.linalg.norm(first) / np.linalg.norm(second)

    feats = np.asarray(apply(network.fold(measured), images))
    assert 0.2 < feats.mean() < 0.8
    assert 0.3 < feats.std() < 1.2
    assert (feats.max((0, 1)) > 0).mean() > 0.95
    assert similarity(feats) < 0.7
    assert similarity(apply(network.fold(raw), images)) > 0.9  # the reason for measuring


def test_measure_normalises_every_channel_and_is_deterministic():
    images = pictures(6, 83)
    raw = network.init(jax.random.key(3), "mixed0")
    for conv in raw.values():
        conv["beta"] = np.full_like(conv["beta"], 20)  # so that relu clips nothing
    measured = measure(raw, images, "mixed0")
    feats = np.asarray(apply(network.fold(measured), images, block="mixed0"))
    np.testing.assert_allclose(feats.mean((0, 1)), 20, atol=0.01)
    np.testing.assert_allclose(feats.std((0, 1)), 1, atol=0.05)
    again = measure(measured, images, "mixed0")
    jax.tree.map(np.testing.assert_array_equal, measured, again)


def test_init_depends_on_the_key_alone_and_holds_only_what_the_block_needs():
    first, same, other = (network.init(jax.random.key(seed), "mixed0") for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert (first["conv2d_1"]["kernel"] != other["conv2d_1"]["kernel"]).all()
    assert list(first) == [f"conv2d_{n}" for n in range(1, 13)]
    assert {a.dtype for a in jax.tree.leaves(first)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(first["conv2d_5"]["kernel"].std(), np.sqrt(2 / (3 * 3 * 80)), rtol=0.02)


@pytest.mark.parametrize(("block", "size"), [("mixed0", 83), ("mixed0", 120), ("mixed4", 160)])
def test_a_batch_equals_its_images_one_by_one(block, size):
    images = pictures(3, size)
    folded = network.fold(measure(network.init(jax.random.key(1), block), images, block))
    feats = np.asarray(apply(folded, images, block=block))
    assert feats.shape == (3, 64, network.FEATURES[block])
    single = [np.asarray(apply(folded, images[i : i + 1].astype(np.float32), block=block))[0] for i in range(3)]
    np.testing.assert_allclose(feats, single, atol=1e-5)


def test_widths_of_the_blocks():
    widths = [256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048, 2048]
    assert {f"mixed{i}": width for i, width in enumerate(widths)} == network.FEATURES
    assert tuple(network.FEATURES) == network.BLOCKS


@pytest.mark.parametrize(
    ("block", "shape", "words"),
    [
        ("mixed10", (1, 298, 298, 3), ["mixed10", "299x299", "298x298", "8x8"]),
        ("mixed3", (1, 100, 100, 3), ["mixed3", "155x155", "100x100"]),
        ("mixed0", (1, 82, 82, 3), ["83x83", "82x82"]),
        ("mixed0", (1, 10, 10, 3), ["83x83", "10x10"]),
        ("mixed0", (1, 90, 100, 3), ["square", "[1, 90, 100, 3]"]),
        ("mixed0", (1, 90, 90, 1), ["RGB", "[1, 90, 90, 1]"]),
        ("mixed11", (1, 299, 299, 3), ["mixed11", "mixed0", "mixed10"]),
    ],
)
def test_unusable_images_are_refused_by_name(block, shape, words):
    with pytest.raises(ValueError, match="InceptionV3") as caught:
        network.apply({}, jnp.zeros(shape), block=block)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("block", network.BLOCKS)
def test_the_size_asked_for_is_the_smallest_that_works(block):
    with pytest.raises(ValueError, match="at least") as caught:
        network.check_size((1, 75, 75, 3), block)
    needed = int(re.findall(r"at least (\d+)x", str(caught.value))[0])
    params = {
        name: {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
            "bias": jax.ShapeDtypeStruct(shape[3:], jnp.float32),
        }
        for name, shape in network.kernel_shapes(block).items()
    }
    image = jax.ShapeDtypeStruct((1, needed, needed, 3), jnp.uint8)
    feats = jax.eval_shape(lambda p, x: network.apply(p, x, block=block), params, image)
    assert feats.shape == (1, 64, network.FEATURES[block])
    assert network.grid_of(needed, block) == 8
    assert network.grid_of(needed - 1, block) == 7


def test_the_encoder_describes_itself():
    last: base.ImageEncoder = InceptionV3(Encoder())
    assert (last.name, last.positions, last.features) == ("inception_v3-mixed10", 64, 2048)
    assert last.preprocess == Preprocess(SIZE)
    assert last.stages == network.BLOCKS
    early = InceptionV3(Encoder(block="mixed3", image_size=160))
    assert (early.name, early.positions, early.features) == ("inception_v3-mixed3", 64, 768)
    assert early.preprocess == Preprocess(160)
    assert early.stages == ("mixed0", "mixed1", "mixed2", "mixed3")
    assert last.grid == early.grid == (8, 8)


def test_abstract_params_are_the_shapes_of_load():
    early, last = InceptionV3(Encoder(block="mixed0", image_size=83)), InceptionV3(Encoder())
    loaded, _ = early.load(weights="random", sample=lambda: pictures(2, 83))
    for encoder, params in ((early, loaded), (last, network.init(jax.random.key(0)))):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        assert shapes == encoder.abstract_params()


def test_kernels_are_transformed_for_many_float32_images_on_a_cpu_only():
    encoder = InceptionV3(Encoder(block="mixed0", image_size=83))
    params = network.init(jax.random.key(0), "mixed0")
    for platform, dtype, many in (("cpu", jnp.bfloat16, True), ("gpu", jnp.float32, True), ("cpu", jnp.float32, False)):
        found = encoder.inference_params(params, platform=platform, dtype=jnp.dtype(dtype), many=many)
        assert {frozenset(layer) for layer in found.values()} == {frozenset({"kernel", "bias"})}
    found = encoder.inference_params(params, platform="cpu", dtype=jnp.dtype("float32"), many=True)
    assert frozenset({"points", "bias"}) in {frozenset(layer) for layer in found.values()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Encoder(block="mixed11"), r"--config\.encoder\.block=mixed11: expected one of mixed0, .*mixed1"),
        (Encoder(image_size=298), r"--config\.encoder\.image_size=298: .* at least 299x299 pixels"),
        (Encoder(block="mixed0", image_size=70), r"--config\.encoder\.image_size=70: .* at least 83x83 pixels"),
    ],
)
def test_a_preset_that_the_encoder_cannot_use_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        InceptionV3(config)
