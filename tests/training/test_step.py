"""The step: the loss counts real tokens only, any number of devices gives the same numbers, state is donated."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_step import (
    BIND,
    CONFIG,
    INIT,
    AnyInputs,
    C,
    I,
    assert_same,
    batch,
    changed,
    compiled_step,
    inputs_on,
    made,
    step_on,
)

from flaxcap.config import Train
from flaxcap.models import output_layer
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import PAD, START
from flaxcap.training import objective
from flaxcap.training import step as step_lib
from flaxcap.training.objective import Microbatch, StepContext
from flaxcap.training.state import init_state


@pytest.fixture(scope="module")
def one_device():
    return step_on(1)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_gives_the_same_loss_gradients_and_parameters(one_device, devices):
    assert_same(step_on(devices), one_device)


@pytest.mark.parametrize("devices", [2, 8])
def test_the_devices_exchange_nothing_but_one_sum_of_gradients(devices):
    """Neither features nor activations travel: what each device computes is its own images' alone."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    text = compiled_step(mesh).as_text()
    assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast", text)
    sums = re.findall(r"= (\([^)]*\)|\S+) all-reduce\(", text)
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(sums))
    sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in shapes]
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(INIT, jax.random.key(0))))
    # The gradients, and the numbers of nats, tokens, right tokens and captions.
    assert sum(sizes) == parameters + 4


def test_the_gradients_travel_in_one_sum():
    text = compiled_step(sharding.make_mesh(jax.devices()[:2])).as_text()
    shapes = re.findall(r"= (\([^)]*\)|\S+) all-reduce\(", text)
    assert sum("," in shape for shape in shapes) == 1  # what else is summed is a single number


@pytest.mark.parametrize(
    ("images", "devices", "most", "parts"),
    [
        (64, 1, 0, 4),
        (64, 2, 0, 2),
        (24, 1, 0, 2),
        (34, 1, 0, 2),
        (17, 1, 0, 1),
        (1, 1, 0, 1),
        (64, 1, 8, 8),
        (6, 1, 4, 2),
    ],
)
def test_microbatches_are_equal_parts_near_what_is_asked(images, devices, most, parts):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    assert step_lib.microbatches(images, mesh, Train(microbatch_images=most)) == parts


def test_the_work_of_a_device_does_not_grow_with_the_number_of_devices():
    """Weak scaling: as many images a device, the same arithmetic and memory on each."""
    costs = []
    for devices in (1, 2, 4, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        compiled = compiled_step(mesh, images=4 * devices)
        costs.append((compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes))
    flops, memory = zip(*costs, strict=True)
    np.testing.assert_allclose(flops[1:], flops[1], rtol=1e-6)
    np.testing.assert_allclose(flops[0], flops[1], rtol=1e-2)
    assert max(memory) < 1.2 * min(memory)


def test_memory_is_linear_in_the_batch_and_in_the_length():
    mesh = sharding.make_mesh(jax.devices()[:1])
    whole = changed(microbatch_images=1000)

    def needs(images: int, time: int) -> int:
        return compiled_step(mesh, whole, images, time).memory_analysis().temp_size_in_bytes

    for a, b, c in ([needs(n, 16) for n in (32, 64, 96)], [needs(32, n) for n in (17, 33, 49)]):
        assert c - b == pytest.approx(b - a, rel=0.1)
        assert a < b < c
    microbatches = [compiled_step(mesh, CONFIG, n, 16).memory_analysis().temp_size_in_bytes for n in (16, 64, 256)]
    assert max(microbatches) < 1.3 * min(microbatches)  # what a microbatch needs, whatever the batch


def test_several_steps_a_dispatch_are_the_steps_one_by_one():
    mesh = sharding.make_mesh(jax.devices()[:2])
    singles = [inputs_on(mesh, *batch(seed)) for seed in range(3)]
    train_step, fresh = made(mesh)

    # A device's part of the bank holds its images of all batches; a fourth batch is there but not meant.
    banks = [np.split(np.asarray(s.bank_NPF), 2) for s in singles]
    bank_NPF = np.concatenate([np.concatenate([bank[d] for bank in banks]) for d in range(2)])
    index_JI = np.concatenate(
        [np.asarray(s.index_JI) + j * I // 2 for j, s in enumerate(singles)] + [singles[0].index_JI]
    )
    tokens_JICT = np.concatenate([s.tokens_JICT for s in [*singles, singles[0]]])
    weight_JIC = np.concatenate([s.weight_JIC for s in [*singles, singles[0]]])
    together = jax.device_put(
        AnyInputs(bank_NPF, index_JI, tokens_JICT, weight_JIC, np.int32(3)),
        jax.tree.map(lambda x: x.sharding, singles[0]),
    )
    state, metrics = train_step(fresh, together)
    _, one_by_one = made(mesh)
    for j, inputs in enumerate(singles):
        one_by_one, found = train_step(one_by_one, inputs)
        for name, value in found.items():
            np.testing.assert_allclose(metrics[name][j], value[0], rtol=1e-6, err_msg=name)
    assert int(state.step) == 3
    assert all(float(value[3]) == 0 for value in metrics.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), state.params, one_by_one.params)


def test_the_loss_is_the_mean_over_real_tokens_of_the_whole_batch(one_device):
    feats_IPF, tokens_ICT = batch()
    decoder = BIND(init_state(INIT, optax.identity(), 0, sharding.make_mesh(jax.devices()[:1])).params)
    losses = []
    for i, c in np.ndindex(I, C):
        length = int((tokens_ICT[i, c] != PAD).sum())
        if length:  # each caption alone, cut to its own length
            caption = jnp.asarray(tokens_ICT[i : i + 1, c : c + 1, :length])
            states_TICS, _ = decoder(jnp.asarray(feats_IPF[i : i + 1]), caption[..., :-1])
            logits_TV = output_layer.logits(decoder.output_weights(), states_TICS)[:, 0, 0]
            losses += (-jax.nn.log_softmax(logits_TV)[np.arange(length - 1), caption[0, 0, 1:]]).tolist()
    metrics = one_device[1][0]
    assert metrics["tokens"] == len(losses)
    assert metrics["captions"] == (tokens_ICT[..., 0] == START).sum()
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("train", [{}, {"label_smoothing": 0.1, "doubly_stochastic": 0.5}])
def test_padding_changes_neither_loss_nor_gradients(train):
    feats_IPF, tokens_ICT = batch()
    params = INIT(jax.random.key(0))
    padded = [(0, 0), (0, 2), (0, 5)]  # two absent captions an image, five <pad> at every end

    def loss(params, tokens):
        part = Microbatch(feats_IPF, tokens, jnp.ones(tokens.shape[:2]), jnp.arange(I))
        moment = StepContext(jax.random.key(0), jnp.ones(()), jnp.zeros(()))
        total, (sums, _) = objective.objective(BIND(params), part, moment, changed(**train).train)
        return total / sums.tokens

    run = jax.jit(jax.value_and_grad(loss))
    short, long = run(params, jnp.asarray(tokens_ICT)), run(params, jnp.asarray(np.pad(tokens_ICT, padded)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), short, long)


def test_the_state_is_donated():
    mesh = sharding.make_mesh(jax.devices()[:1])
    train_step, state = made(mesh)
    train_step(state, inputs_on(mesh, *batch()))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
