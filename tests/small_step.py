"""Steps of a small model on synthetic batches, on any number of devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import Config, Dropout, Model, Train
from flaxcap.input_pipeline.device_feed import Inputs
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import END, PAD, START
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import TrainState, init_state

F, V, I, C, T = 12, 30, 8, 3, 7
CONFIG = Config(
    model=Model(image_dim=6, embedding_dim=5, attention_dim=7, hidden_dim=8, head_dim=9),
    train=Train(learning_rate=1e-2, warmup_steps=2),
)
BIND, INIT = decoder_lib.create(CONFIG, decoder_lib.Sizes(64, F, V))
# Every kind of noise and every additional term.
NOISY = Config(
    model=dataclasses.replace(CONFIG.model, attention="hard"),
    train=dataclasses.replace(
        CONFIG.train,
        dropout=Dropout(image=0.2, embedding=0.1, attention=0.3, recurrent=0.2, output=0.4),
        label_smoothing=0.1,
        doubly_stochastic=0.5,
        scheduled_sampling=0.9,
        weight_decay=0.1,
        ema=0.9,
    ),
)


def changed(config: Config = CONFIG, **train: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def batch(seed: int = 0) -> tuple[Any, Any]:
    """Returns `feats_IPF` and `tokens_ICT`: captions of 2 to 5 words, some absent."""
    rng = np.random.default_rng(seed)
    tokens_ICT = np.full((I, C, T), PAD, np.int32)
    for i, c in np.ndindex(I, C):
        n = int(rng.integers(2, T - 1))
        if rng.random() < 0.8 or (i, c) == (0, 0):
            tokens_ICT[i, c, : n + 1] = [START, *rng.integers(4, V, n - 1), END]
    return rng.standard_normal((I, 64, F)).astype(np.float32), tokens_ICT


AnyInputs: Any = Inputs  # with NumPy arrays or shardings


def inputs_on(mesh, feats_IPF, tokens_ICT) -> Inputs:
    """Returns a dispatch of one batch. Each device's part of the bank has its images in reverse order."""
    width = I // mesh.size
    order = np.concatenate([d * width + np.arange(width)[::-1] for d in range(mesh.size)])
    index_I: Any = np.tile(np.arange(width)[::-1], mesh.size).astype(np.int32)
    weight_IC = np.ones(tokens_ICT.shape[:2], np.float32)
    inputs = AnyInputs(feats_IPF[order], index_I[None], tokens_ICT[None], weight_IC[None], np.int32(1))
    return jax.device_put(inputs, shardings(mesh))


def shardings(mesh) -> Any:
    return AnyInputs(sharding.over_images(mesh), *[sharding.over_images(mesh, 1)] * 3, sharding.replicated(mesh))


def made(mesh, config: Config = CONFIG) -> tuple[Any, TrainState]:
    """Returns the train step and a new state."""
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(64, F, V))
    schedule = learning_rate(config.train, 10)
    optimizer = make_optimizer(config.train)
    state = init_state(init, optimizer, 0, mesh, config.train.ema)
    return step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, 10), state


def step_on(devices: int, steps: int = 3, config: Config = CONFIG):
    """Returns the state, and the metrics of each step, of a run on some devices."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    train_step, state = made(mesh, config)
    metrics = []
    for seed in range(steps):
        state, found = train_step(state, inputs_on(mesh, *batch(seed)))
        metrics.append({name: value[0] for name, value in jax.device_get(found).items()})
    return jax.device_get(state), metrics


def compiled_step(mesh, config: Config = CONFIG, images: int = I, time: int = T) -> Any:
    """Returns the compiled step of batches with this number of images and tokens."""
    train_step, state = made(mesh, config)
    feats_IPF, tokens_ICT = np.zeros((images, 64, F), np.float32), np.full((images, C, time), START, np.int32)
    weight_JIC = np.ones((1, images, C), np.float32)
    inputs = AnyInputs(feats_IPF, np.zeros((1, images), np.int32), tokens_ICT[None], weight_JIC, np.int32(1))
    return train_step.lower(state, jax.device_put(inputs, shardings(mesh))).compile()


def assert_same(ours: Any, expected: Any) -> None:
    """Compares state and metrics of two runs, up to rounding."""
    for found, other in zip(ours[1], expected[1], strict=True):
        assert found.keys() == other.keys()
        for name in found:
            np.testing.assert_allclose(found[name], other[name], rtol=2e-5, err_msg=name)
    assert (ours[0].average is None) == (expected[0].average is None)
    for name in ("params", "average", "baseline"):
        a, b = getattr(ours[0], name), getattr(expected[0], name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), a, b)


def state_on(devices: int, width: int = 3, ema: float = 0.0) -> TrainState:
    """Returns a state whose leaves all differ; its average, if any, differs from the parameters."""
    mesh = sharding.make_mesh(jax.devices()[:devices])

    def init(key):
        return {"a": {"kernel": jax.random.normal(key, (4, width))}, "b": jnp.arange(5.0)}

    state = init_state(init, make_optimizer(Train()), 3, mesh, ema)
    average = None if state.average is None else jax.tree.map(lambda x: 2 * x + 1, state.average)
    everywhere = state.rate.sharding
    rate, baseline = (jax.device_put(np.float32(x), everywhere) for x in (0.25, -31.5))
    return state._replace(average=average, rate=rate, baseline=baseline)
