"""The step: the loss counts real tokens only, any number of devices gives the same numbers, state is donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxcap import model
from flaxcap import train_step as step_lib
from flaxcap.config import Config, Model, Train
from flaxcap.text import END, PAD, START

F, V, I, C, T = 12, 30, 8, 3, 7
CONFIG = Config(
    model=Model(image_dim=6, embedding_dim=5, attention_dim=7, hidden_dim=8, head_dim=9),
    train=Train(learning_rate=1e-2, warmup_steps=2),
)
BIND, INIT = model.create(CONFIG, F, V)


def batch(seed: int = 0) -> tuple[Any, Any]:
    """`feats_IPF`, and captions of 2 to 5 words, some absent."""
    rng = np.random.default_rng(seed)
    tokens_ICT = np.full((I, C, T), PAD, np.int32)
    for i, c in np.ndindex(I, C):
        n = int(rng.integers(2, T - 1))
        if rng.random() < 0.8 or (i, c) == (0, 0):
            tokens_ICT[i, c, : n + 1] = [START, *rng.integers(4, V, n - 1), END]
    return rng.standard_normal((I, 64, F)).astype(np.float32), tokens_ICT


def inputs_on(mesh, feats_IPF, tokens_ICT) -> step_lib.Inputs:
    """The batch with each device's features in its own part of the bank, in another order."""
    width = I // mesh.size
    order = np.concatenate([d * width + np.arange(width)[::-1] for d in range(mesh.size)])
    index_I: Any = np.tile(np.arange(width)[::-1], mesh.size).astype(np.int32)
    return jax.device_put(step_lib.Inputs(feats_IPF[order], index_I, tokens_ICT), step_lib.over_images(mesh))


def step_on(devices: int, steps: int = 3, config: Config = CONFIG):
    """Parameters and metrics after some steps on so many devices."""
    mesh = step_lib.make_mesh(jax.devices()[:devices])
    schedule = step_lib.learning_rate(config.train, 10)
    optimizer = step_lib.make_optimizer(config.train, schedule)
    state = step_lib.init_state(INIT, optimizer, 0, mesh)
    train_step = step_lib.make_train_step(BIND, optimizer, schedule, mesh)
    metrics = []
    for seed in range(steps):
        state, found = train_step(state, inputs_on(mesh, *batch(seed)))
        metrics.append(jax.device_get(found))
    return jax.device_get(state.params), metrics


@pytest.fixture(scope="module")
def one_device():
    return step_on(1)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_gives_the_same_loss_gradients_and_parameters(one_device, devices):
    params, metrics = step_on(devices)
    for ours, expected in zip(metrics, one_device[1], strict=True):
        assert ours.keys() == expected.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], expected[name], rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, one_device[0])


def test_gradients_agree_between_one_and_eight_devices():
    feats_IPF, tokens_ICT = batch()
    params = INIT(jax.random.key(0))

    def gradients(devices: int):
        mesh = step_lib.make_mesh(jax.devices()[:devices])

        @jax.jit
        def grads(params, inputs):
            def loss(params):
                total, count, _ = step_lib.token_losses(BIND(params), step_lib.gather(mesh, inputs), inputs.tokens_ICT)
                return total / count

            return jax.grad(loss)(params)

        return grads(jax.device_put(params, step_lib.replicated(mesh)), inputs_on(mesh, feats_IPF, tokens_ICT))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients(1), gradients(8))


def test_the_loss_is_the_mean_over_real_tokens_of_the_whole_batch(one_device):
    feats_IPF, tokens_ICT = batch()
    captioner = BIND(step_lib.init_state(INIT, optax.identity(), 0, step_lib.make_mesh(jax.devices()[:1])).params)
    losses = []
    for i, c in np.ndindex(I, C):
        length = int((tokens_ICT[i, c] != PAD).sum())
        if length:  # each caption alone, cut to its own length
            caption = jnp.asarray(tokens_ICT[i : i + 1, c : c + 1, :length])
            logits_TV = captioner.logits(captioner(feats_IPF[i : i + 1], caption[..., :-1])[0])[0, 0]
            losses += (-jax.nn.log_softmax(logits_TV)[np.arange(length - 1), caption[0, 0, 1:]]).tolist()
    metrics = one_device[1][0]
    assert metrics["tokens"] == len(losses)
    assert metrics["captions"] == (tokens_ICT[..., 0] == START).sum()
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_padding_changes_neither_loss_nor_gradients():
    feats_IPF, tokens_ICT = batch()
    params = INIT(jax.random.key(0))
    padded = [(0, 0), (0, 2), (0, 5)]  # two absent captions an image, five <pad> at every end

    def loss(params, tokens):
        total, count, _ = step_lib.token_losses(BIND(params), feats_IPF, tokens)
        return total / count

    short = jax.value_and_grad(loss)(params, jnp.asarray(tokens_ICT))
    long = jax.value_and_grad(loss)(params, jnp.asarray(np.pad(tokens_ICT, padded)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), short, long)


def test_the_state_is_donated():
    mesh = step_lib.make_mesh(jax.devices()[:1])
    schedule = step_lib.learning_rate(CONFIG.train, 10)
    optimizer = step_lib.make_optimizer(CONFIG.train, schedule)
    state = step_lib.init_state(INIT, optimizer, 0, mesh)
    step_lib.make_train_step(BIND, optimizer, schedule, mesh)(state, inputs_on(mesh, *batch()))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))


def test_a_large_gradient_is_clipped():
    unclipped, clipped = Train(clip_norm=0), Train(clip_norm=0.5)
    grads = {"w": jnp.array([30.0, 40.0])}
    for config, norm in ((unclipped, 50), (clipped, 0.5)):
        transform = step_lib.make_optimizer(config, lambda _: 1.0)
        _, state = transform.update(grads, transform.init(grads))
        (moments,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        np.testing.assert_allclose(optax.tree.norm(moments.mu), norm * (1 - 0.9), rtol=1e-5)


def test_learning_rate_warms_up_and_decays():
    def learning_rate(config: Train, steps: int) -> Callable[[int], float]:
        return lambda step: float(np.asarray(step_lib.learning_rate(config, steps)(step)))

    cosine = learning_rate(Train(learning_rate=2.0, warmup_steps=10), 100)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10), cosine(55), cosine(100)], [0, 1, 2, 1.02, 0.04])
    constant = learning_rate(Train(learning_rate=2.0, warmup_steps=10, schedule="constant"), 100)
    np.testing.assert_allclose([constant(0), constant(5), constant(10), constant(100)], [0, 1, 2, 2])
    for schedule in ("constant", "cosine"):
        at_once = learning_rate(Train(learning_rate=2.0, warmup_steps=0, schedule=schedule), 100)
        assert at_once(0) == 2.0
    short = learning_rate(Train(learning_rate=2.0, warmup_steps=10), 4)
    assert short(2) == 2.0  # a run shorter than its warm-up still reaches the peak
