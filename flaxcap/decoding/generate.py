"""Captions from trained models, one token after the other: greedy, sampled or by beam search; batched and jitted.

`make_decode` gives a `Decode`; it folds parameters once, and then captions any number of batches with them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flaxcap import config as config_lib
from flaxcap.decoding.beam_search import beam_search
from flaxcap.decoding.sampling import one_by_one
from flaxcap.decoding.step import Decoded, Folded, Step, fold
from flaxcap.models.recurrent import Bind, Captioner, Params

__all__ = ["Decode", "Decoded", "Folded", "draw", "make_decode"]


class Decode:
    """See `make_decode`."""

    def __init__(self, binds: Sequence[Bind], config: config_lib.Decode):
        self._binds, self._config = tuple(binds), config
        self.length = config.max_length
        self._fold = jax.jit(lambda params: tuple(map(fold, self._binds, params)))
        self._run = jax.jit(self._decode)

    def fold(self, *params: Params) -> tuple[Folded, ...]:
        """Each model's parameters as decoding takes them: cast, and products made that do not depend on images."""
        return self._fold(params)

    def __call__(self, folded: tuple[Folded, ...], feats_IPF: jax.Array, key: jax.Array) -> Decoded:
        return self._run(folded, feats_IPF, key)

    def _decode(self, folded: tuple[Folded, ...], feats_IPF: jax.Array, key: jax.Array) -> Decoded:
        models: list[Captioner] = [bind(f.params) for bind, f in zip(self._binds, folded, strict=True)]
        step = Step(models, folded, feats_IPF)
        if self._config.method == "beam":
            return beam_search(step, self._config)
        keys_I = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(feats_IPF)))
        found = one_by_one(step, self._config, keys_I)
        return jax.tree.map(lambda x: x[:, 0], found)  # one caption of each image


def make_decode(bind: Bind | Sequence[Bind], config: config_lib.Decode) -> Decode:
    """`decode(folded, feats_IPF, key) -> Decoded`, jitted; T is `config.max_length`; `folded = decode.fold(params)`.

    With several models, an ensemble, `fold` takes the parameters of each: each word's probability is the mean of
    theirs, and so is the attention. They must share features and vocabulary.

    <pad>, <start> and <unk> are never chosen, and the last token is <end>. Each image is decoded as if it were
    alone: to sample, image i draws from `fold_in(key, i)`; greedy and beam search ignore the key.
    """
    return Decode([bind] if callable(bind) else bind, config)


def draw(
    bind: Bind, params: Params, feats_IPF: jax.Array, config: config_lib.Decode, keys_I: jax.Array, captions: int
) -> jax.Array:
    """`tokens_ICT` of so many captions of each image, sampled from the image's key; to be called inside a jit."""
    folded = (fold(bind, params),)
    return one_by_one(Step([bind(folded[0].params)], folded, feats_IPF), config, keys_I, captions).tokens_IT
