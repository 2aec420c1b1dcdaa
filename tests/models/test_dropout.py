"""What a step draws: masks that keep the mean, image by image, from its key and the image's place alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcap.config import Config, Dropout, Model, Train
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import dropout, recurrent
from flaxcap.models.cell import NO_NOISE
from flaxcap.models.recurrent import NO_NOISE, Dropped

F, V, I, C, T, P = 5, 30, 6, 3, 7, 64
KINDS = ("image", "embedding", "attention", "recurrent", "output")
SHAPES = {
    "image": (I, P, 16),
    "embedding": (T, I, C, 8),
    "attention": (T, I, C, P),
    "recurrent": (I, C, 12),
    "output": (T, I, C, 12),
}


def captioner(dtype: str = "float32", **options: Any) -> recurrent.Captioner:
    sizes: dict[str, Any] = {"image_dim": 16, "embedding_dim": 8, "attention_dim": 6, "hidden_dim": 12, "head_dim": 9}
    bind, init = decoder_lib.create(
        Config(model=Model(**sizes | options), train=Train(dtype=dtype)), decoder_lib.Sizes(P, F, V)
    )
    return bind(init(jax.random.key(0)))


def keys(images: int = I, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), images)


def draw(of: recurrent.Captioner, keys_I: jax.Array, captions: int = C, /, **shares: Any) -> Dropped:
    return dropout.dropped(of, keys_I, captions, T, P, Dropout(**shares))


def mask(found: Dropped, kind: str) -> np.ndarray:
    masks: dict[str, Any] = dict(zip(("image", "embedding", "output"), found[:3], strict=True))
    masks |= {"recurrent": found.cell.hidden_ICH, "attention": found.cell.alpha_TICP}
    assert all((some is None) == (name != kind) for name, some in masks.items())
    return np.asarray(masks[kind], np.float32)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_its_share_and_keeps_the_mean(kind, share):
    """The share in 256ths; what is kept grows by as much as is hidden. One mask of a state for all the tokens."""
    found = mask(draw(captioner(), keys(), **{kind: share}), kind)
    assert found.shape == SHAPES[kind]
    hidden = round(256 * share) / 256
    np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - hidden)], rtol=1e-6)
    # Four standard deviations of the mean.
    error = 4 * np.sqrt(hidden / (1 - hidden) / found.size)
    assert abs(found.mean() - 1) < error < 0.6
    many = mask(draw(captioner(), keys(60), 30, **{kind: share}), kind)
    assert abs(many.mean() - 1) < 4 * np.sqrt(hidden / (1 - hidden) / many.size) < 0.06


@pytest.mark.parametrize("share", [0.0, 0.001])
def test_a_share_of_nothing_draws_nothing(share):
    found = draw(captioner(), keys(), **dict.fromkeys(KINDS, share))
    assert found == NO_NOISE == Dropped(None, None, None, NO_NOISE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_draws_the_same_in_any_company(kind):
    """So it does not matter how many devices share a batch, nor in how many parts a device computes its own."""
    axis = 0 if kind in ("image", "recurrent") else 1
    together = mask(draw(captioner(), keys(), **{kind: 0.5}), kind)
    apart = [mask(draw(captioner(), keys()[i : i + 2], **{kind: 0.5}), kind) for i in range(0, I, 2)]
    np.testing.assert_array_equal(np.concatenate(apart, axis), together)
    images = np.moveaxis(together, axis, 0).reshape(I, -1)
    assert len(np.unique(images, axis=0)) == I  # and each its own


@pytest.mark.parametrize("kind", KINDS)
def test_other_keys_draw_other_masks(kind):
    one, other = (mask(draw(captioner(), keys(seed=n), **{kind: 0.5}), kind) for n in range(2))
    assert 0.3 < (one != other).mean() < 0.7


def test_every_caption_and_token_and_kind_has_a_mask_of_its_own():
    of = captioner(embedding_dim=12, head_dim=12)
    found = draw(of, keys(), embedding=0.5, attention=0.5, output=0.5, recurrent=0.5)
    assert found.words_TICE is not None
    assert found.states_TICS is not None
    assert found.cell.alpha_TICP is not None
    assert found.cell.hidden_ICH is not None
    for masks in (found.words_TICE, found.states_TICS, found.cell.alpha_TICP):
        assert len(np.unique(np.asarray(masks).reshape(T * I * C, -1), axis=0)) > 0.9 * T * I * C
    assert len(np.unique(np.asarray(found.cell.hidden_ICH).reshape(I * C, -1), axis=0)) == I * C
    assert (np.asarray(found.words_TICE) != found.states_TICS).mean() > 0.3


def test_masks_are_of_the_models_type():
    found = draw(captioner("bfloat16"), keys(), **dict.fromkeys(KINDS, 0.5))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def test_hard_attention_draws_gumbel_noise_and_half_of_the_images():
    found = draw(captioner(attention="hard"), keys(2000), 1)
    assert found[:3] == (None, None, None)
    gumbel_TICP, hard_I = found.cell.gumbel_TICP, found.cell.hard_I
    assert gumbel_TICP is not None
    assert hard_I is not None
    assert gumbel_TICP.shape == (T, 2000, 1, P)
    np.testing.assert_allclose(hard_I.mean(), 0.5, atol=0.05)
    # Gumbel's distribution: mean 0.5772, variance pi^2 / 6.
    np.testing.assert_allclose([gumbel_TICP.mean(), gumbel_TICP.var()], [0.5772, np.pi**2 / 6], atol=0.01)
    few = draw(captioner(attention="hard"), keys(2000)[3:5], 1)
    np.testing.assert_array_equal(few.cell.gumbel_TICP, gumbel_TICP[:, 3:5])
    np.testing.assert_array_equal(few.cell.hard_I, hard_I[3:5])
    assert draw(captioner(attention="soft"), keys()).cell == NO_NOISE


@pytest.mark.parametrize("output", ["state", "deep"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_mask_hides_what_it_is_for(kind, output):
    """All of it hidden: then what it hides does not matter any more; the masks are not for each other's."""
    of = captioner(output=output)
    feats_IPF = jax.random.normal(jax.random.key(1), (I, P, F))
    tokens_ICT = jax.random.randint(jax.random.key(2), (I, C, T), 4, V)
    nothing = jax.tree.map(jnp.zeros_like, draw(of, keys(), **{kind: 0.5}))

    def states(feats: jax.Array = feats_IPF, tokens: jax.Array = tokens_ICT) -> np.ndarray:
        return np.asarray(of(feats, tokens, nothing)[0])

    plain = np.asarray(of(feats_IPF, tokens_ICT)[0])
    hidden = states()
    assert np.abs(hidden - plain).max() > 1e-3
    other_feats, other_tokens = -feats_IPF, tokens_ICT[..., ::-1]
    blind = np.abs(states(feats=other_feats) - hidden).max() < 1e-6
    deaf = np.abs(states(tokens=other_tokens) - hidden).max() < 1e-6
    assert blind == (kind in ("image", "attention", "output"))
    assert deaf == (kind in ("embedding", "output"))
    if kind == "output":
        assert (hidden == 0).all()
