"""Images with fewer positions than others give the results that they give alone, without their unused positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_objective import C, F, I, P, V, assert_near, batch, make, results, sharpened, step_context

from flaxcap.config import Config, ConfigError, Decode, Dropout, Model, Train
from flaxcap.decoding.generate import Generator
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import hard_attention
from flaxcap.models.decoder import Sizes
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch

POSITIONS = (3, 5, 9, 9)  # of the images; P is 9
VARYING = Sizes(P, F, V, positions_vary=True)
OPTIONS = [
    pytest.param({}, id="gru"),
    pytest.param(
        {"cell": "lstm", "initial_state": "mean", "attention_gate": True, "output": "deep"}, id="lstm-mean-gate-deep"
    ),
]


def valid() -> np.ndarray:
    """Returns the positions that each image has: bool `[I, P]`. Unused positions are scattered."""
    rng = np.random.default_rng(5)
    return np.stack([rng.permutation(np.arange(P) < positions) for positions in POSITIONS])


def varying_batch() -> Microbatch:
    """Returns `batch()` with NaN at the unused positions."""
    microbatch = batch()
    return microbatch._replace(feats_IPF=jnp.where(valid()[..., None], microbatch.feats_IPF, jnp.nan))


def alone(i: int) -> tuple[Sizes, Microbatch]:
    """Returns image i without its unused positions, as a batch of one image with a fixed number of positions."""
    microbatch = jax.tree.map(lambda x: x[i : i + 1], batch())
    return Sizes(POSITIONS[i], F, V), microbatch._replace(feats_IPF=microbatch.feats_IPF[:, valid()[i]])


@pytest.mark.parametrize("options", OPTIONS)
def test_states_and_attention_weights_equal_those_of_each_image_alone(options):
    bind, params = make(sizes=VARYING, **options)
    microbatch = varying_batch()
    states_TICS, alpha_TICP = jax.jit(lambda *args: bind(params)(*args))(microbatch.feats_IPF, microbatch.tokens_ICT)
    for i in range(I):
        sizes, image = alone(i)
        expected, alpha = make(sizes=sizes, **options)[0](params)(image.feats_IPF, image.tokens_ICT)
        np.testing.assert_allclose(states_TICS[:, i], expected[:, 0], atol=1e-6)
        np.testing.assert_allclose(np.asarray(alpha_TICP)[:, i][..., valid()[i]], alpha[:, 0], atol=1e-6)
        assert (np.asarray(alpha_TICP)[:, i][..., ~valid()[i]] == 0).all()
    assert np.isfinite(states_TICS).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_objectives_gradients_equal_the_sums_over_images_alone(options):
    """Doubly stochastic attention adds 1 for each unused position of a caption, which has no gradient."""
    bind, params = make(sizes=VARYING, **options)
    train: dict[str, Any] = {"label_smoothing": 0.1, "doubly_stochastic": 0.5}
    (total, found), grads = results(bind, params, varying_batch(), **train)
    expected_total, expected_nats, expected = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
    for i in range(I):
        sizes, image = alone(i)
        (image_total, image_sums), image_grads = results(make(sizes=sizes, **options)[0], params, image, **train)
        expected_total += image_total + 0.5 * (P - POSITIONS[i]) * image_sums.captions
        expected_nats += image_sums.sums.nats
        expected = jax.tree.map(jnp.add, expected, image_grads)
    np.testing.assert_allclose(found.sums.nats, expected_nats, rtol=1e-6)
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    assert_near(grads, expected, 1e-6)


def test_all_gradients_are_finite_with_dropout_and_hard_attention():
    """Those of the features too: they train an encoder. An unused position has a gradient of 0."""
    bind, params = make(sizes=VARYING, attention="hard", initial_state="mean")
    microbatch = varying_batch()
    config = Train(
        dropout=Dropout(image=0.2, embedding=0.1, attention=0.3, recurrent=0.2, output=0.4),
        doubly_stochastic=0.5,
        scheduled_sampling=0.5,
    )

    def total(params: Any, feats_IPF: jax.Array) -> jax.Array:
        given = microbatch._replace(feats_IPF=feats_IPF)
        return objective.objective(bind(params), given, step_context(), config)[0]

    grads, d_feats_IPF = jax.jit(jax.grad(total, (0, 1)))(params, microbatch.feats_IPF)
    for leaf in jax.tree.leaves((grads, d_feats_IPF)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    assert (np.asarray(d_feats_IPF)[~valid()] == 0).all()
    assert (np.abs(np.asarray(d_feats_IPF)[valid()]).max(-1) > 0).all()


def test_hard_attention_draws_no_unused_position():
    bind, params = make(sizes=VARYING, attention="hard")
    microbatch = varying_batch()
    _, alpha_TICP = bind(params)(microbatch.feats_IPF, microbatch.tokens_ICT)
    draws = hard_attention.draw(jax.random.split(jax.random.key(0), I), len(alpha_TICP), C, P)
    chosen = np.asarray(hard_attention.choose(alpha_TICP, draws.gumbel_TICP)).sum((0, 2))
    assert (chosen[~valid()] == 0).all()
    assert (chosen.sum(-1) == len(alpha_TICP) * C).all()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_first_state_is_of_the_mean_over_the_positions_that_an_image_has(cell):
    bind, params = make(sizes=VARYING, cell=cell, initial_state="mean")
    decoder: Any = bind(params)
    memory = decoder.remember(varying_batch().feats_IPF)
    carry = decoder.start(memory, C)
    for i in range(I):
        values_PD = np.asarray(memory.values_IPD[i])[valid()[i]]
        state = np.tanh(values_PD.mean(0) @ params["first"]["kernel"] + params["first"]["bias"])
        found = np.concatenate([x[i, 0] for x in carry if x is not None])
        np.testing.assert_allclose(found, state, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("decode", [{"method": "greedy"}, {"method": "beam", "beam_width": 3}], ids=["greedy", "beam"])
def test_captions_equal_those_of_each_image_alone(options, decode):
    bind, params = make(sizes=VARYING, **options)
    params = sharpened(params)
    config, key = Decode(max_length=8, **decode), jax.random.key(0)

    def caption(bind: Any, feats_IPF: jax.Array) -> Any:
        generator = Generator(bind, config)
        return jax.device_get(generator(generator.freeze(params), feats_IPF, key))

    found = caption(bind, varying_batch().feats_IPF)
    assert len({tokens_T.tobytes() for tokens_T in found.tokens_IT}) > 1
    for i in range(I):
        sizes, image = alone(i)
        expected = caption(make(sizes=sizes, **options)[0], image.feats_IPF)
        np.testing.assert_array_equal(found.tokens_IT[i], expected.tokens_IT[0])
        np.testing.assert_allclose(found.log_prob_I[i], expected.log_prob_I[0], rtol=1e-5)
        np.testing.assert_allclose(found.alpha_ITP[i][:, valid()[i]], expected.alpha_ITP[0], atol=1e-6)
        assert (found.alpha_ITP[i][:, ~valid()[i]] == 0).all()


def test_learned_positions_need_a_fixed_number_of_positions():
    config = Config(model=Model(positions=True))
    with pytest.raises(ConfigError, match=r"model\.positions=True: expected False"):
        decoder_lib.create(config, VARYING)
