"""Dropout masks keep the mean, hide only their own input, and depend on nothing but an image's key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.config import Config, Dropout, Model, Train
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import recurrent
from flaxcap.models.cell import NO_CELL_NOISE
from flaxcap.models.recurrent import NO_NOISE, Noise

F, V, I, C, T, P = 5, 30, 6, 3, 7, 64
KINDS = ("image", "embedding", "attention", "recurrent", "output")
SHAPES = {
    "image": (I, P, 16),
    "embedding": (T, I, C, 8),
    "attention": (T, I, C, P),
    "recurrent": (I, C, 12),
    "output": (T, I, C, 12),
}


def make(dtype: str = "float32", **options: Any) -> recurrent.RecurrentDecoder:
    sizes: dict[str, Any] = {"image_dim": 16, "embedding_dim": 8, "attention_dim": 6, "hidden_dim": 12, "head_dim": 9}
    bind, init = decoder_lib.create(
        Config(model=Model(**sizes | options), train=Train(dtype=dtype)), decoder_lib.Sizes(P, F, V)
    )
    decoder: Any = bind(init(jax.random.key(0)))
    return decoder


def keys(images: int = I, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), images)


def draw(decoder: recurrent.RecurrentDecoder, keys_I: jax.Array, captions: int = C, /, **shares: Any) -> Noise:
    return decoder.draw_noise(keys_I, captions, T, Dropout(**shares))


def mask(noise: Noise, kind: str) -> np.ndarray:
    """Returns the only mask of the noise, which must be of this kind."""
    masks: dict[str, Any] = dict(zip(("image", "embedding", "output"), noise[:3], strict=True))
    masks |= {"recurrent": noise.cell.hidden_ICH, "attention": noise.cell.alpha_TICP}
    assert all((some is None) == (name != kind) for name, some in masks.items())
    return np.asarray(masks[kind], np.float32)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_its_share_and_keeps_the_mean(kind, share):
    """Shares are rounded to a multiple of 1/256. All tokens have the same mask of the recurrent state."""
    found = mask(draw(make(), keys(), **{kind: share}), kind)
    assert found.shape == SHAPES[kind]
    hidden = round(256 * share) / 256
    np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - hidden)], rtol=1e-6)
    # Four standard deviations of the mean.
    error = 4 * np.sqrt(hidden / (1 - hidden) / found.size)
    assert abs(found.mean() - 1) < error < 0.6
    many = mask(draw(make(), keys(60), 30, **{kind: share}), kind)
    assert abs(many.mean() - 1) < 4 * np.sqrt(hidden / (1 - hidden) / many.size) < 0.06


@pytest.mark.parametrize("share", [0.0, 0.001])
def test_a_share_that_rounds_to_zero_draws_nothing(share):
    noise = draw(make(), keys(), **dict.fromkeys(KINDS, share))
    assert noise == NO_NOISE == Noise(None, None, None, NO_CELL_NOISE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_masks_do_not_depend_on_the_batch(kind):
    """Therefore they do not depend on the number of devices or of microbatches. Each image has its own masks."""
    axis = 0 if kind in ("image", "recurrent") else 1
    together = mask(draw(make(), keys(), **{kind: 0.5}), kind)
    apart = [mask(draw(make(), keys()[i : i + 2], **{kind: 0.5}), kind) for i in range(0, I, 2)]
    np.testing.assert_array_equal(np.concatenate(apart, axis), together)
    images = np.moveaxis(together, axis, 0).reshape(I, -1)
    assert len(np.unique(images, axis=0)) == I


@pytest.mark.parametrize("kind", KINDS)
def test_other_keys_draw_other_masks(kind):
    one, other = (mask(draw(make(), keys(seed=n), **{kind: 0.5}), kind) for n in range(2))
    assert 0.3 < (one != other).mean() < 0.7


def test_every_caption_token_and_kind_has_its_own_mask():
    decoder = make(embedding_dim=12, head_dim=12)
    noise = draw(decoder, keys(), embedding=0.5, attention=0.5, output=0.5, recurrent=0.5)
    assert noise.words_TICE is not None
    assert noise.states_TICS is not None
    assert noise.cell.alpha_TICP is not None
    assert noise.cell.hidden_ICH is not None
    for masks in (noise.words_TICE, noise.states_TICS, noise.cell.alpha_TICP):
        assert len(np.unique(np.asarray(masks).reshape(T * I * C, -1), axis=0)) > 0.9 * T * I * C
    assert len(np.unique(np.asarray(noise.cell.hidden_ICH).reshape(I * C, -1), axis=0)) == I * C
    assert (np.asarray(noise.words_TICE) != noise.states_TICS).mean() > 0.3


def test_masks_have_the_decoders_dtype():
    noise = draw(make("bfloat16"), keys(), **dict.fromkeys(KINDS, 0.5))
    assert {x.dtype for x in jax.tree.leaves(noise)} == {jnp.dtype("bfloat16")}


def test_hard_attention_draws_gumbel_noise_and_half_of_the_images():
    noise = draw(make(attention="hard"), keys(2000), 1)
    assert noise[:3] == (None, None, None)
    gumbel_TICP, hard_I = noise.cell.gumbel_TICP, noise.cell.hard_I
    assert gumbel_TICP is not None
    assert hard_I is not None
    assert gumbel_TICP.shape == (T, 2000, 1, P)
    np.testing.assert_allclose(hard_I.mean(), 0.5, atol=0.05)
    # Gumbel's distribution has the mean 0.5772 and the variance pi² / 6.
    np.testing.assert_allclose([gumbel_TICP.mean(), gumbel_TICP.var()], [0.5772, np.pi**2 / 6], atol=0.01)
    few = draw(make(attention="hard"), keys(2000)[3:5], 1)
    np.testing.assert_array_equal(few.cell.gumbel_TICP, gumbel_TICP[:, 3:5])
    np.testing.assert_array_equal(few.cell.hard_I, hard_I[3:5])
    assert draw(make(attention="soft"), keys()).cell == NO_CELL_NOISE


@pytest.mark.parametrize("output", ["state", "deep"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_mask_hides_its_own_input_alone(kind, output):
    """With a mask of zeros the hidden input has no effect. The other inputs still have theirs."""
    decoder = make(output=output)
    feats_IPF = jax.random.normal(jax.random.key(1), (I, P, F))
    tokens_ICT = jax.random.randint(jax.random.key(2), (I, C, T), 4, V)
    zeros = jax.tree.map(jnp.zeros_like, draw(decoder, keys(), **{kind: 0.5}))

    def states(feats: jax.Array = feats_IPF, tokens: jax.Array = tokens_ICT) -> np.ndarray:
        return np.asarray(decoder(feats, tokens, zeros)[0])

    plain = np.asarray(decoder(feats_IPF, tokens_ICT)[0])
    hidden = states()
    assert np.abs(hidden - plain).max() > 1e-3
    other_feats, other_tokens = -feats_IPF, tokens_ICT[..., ::-1]
    ignores_image = np.abs(states(feats=other_feats) - hidden).max() < 1e-6
    ignores_words = np.abs(states(tokens=other_tokens) - hidden).max() < 1e-6
    assert ignores_image == (kind in ("image", "attention", "output"))
    assert ignores_words == (kind in ("embedding", "output"))
    if kind == "output":
        assert (hidden == 0).all()
