"""Captions of batches of images: jitted greedy decoding, sampling or beam search."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flaxcap.config import Decode as DecodeConfig
from flaxcap.decoding import constraints
from flaxcap.decoding.beam_search import beam_search
from flaxcap.decoding.sampling import one_by_one
from flaxcap.decoding.step import Decoded, Frozen, Step, freeze
from flaxcap.models.decoder import Bind, Params
from flaxcap.text.vocabulary import Vocabulary


class Generator:
    """Generates captions with a decoder or an ensemble.

    `freeze` prepares parameters once; then a call captions a batch. <pad>, <start> and <unk> are never chosen, and the
    last token is <end>. Each image is decoded as if it were alone: sampling draws for image i from `fold_in(key, i)`.
    Greedy decoding and beam search ignore the key.
    """

    def __init__(self, binds: Bind | Sequence[Bind], config: DecodeConfig, vocabulary: Vocabulary | None = None):
        """Prepares the programs.

        Args:
          binds: of one decoder, or of several that share features and vocabulary. The ensemble's probabilities and
            attention weights are the means of its members'.
          config: the method, its constraints, and `max_length`, T of the captions.
          vocabulary: of the model; None: `bad_endings` are not removed.

        Raises:
          ConfigError: no word of `bad_endings` is in the vocabulary.
        """
        self._binds, self._config = [binds] if callable(binds) else list(binds), config
        self.length = config.max_length
        self._constraints = constraints.of_preset(config, vocabulary)
        self._freeze = jax.jit(lambda params: tuple(map(freeze, self._binds, params)))
        self._run = jax.jit(self._generate)

    def freeze(self, *params: Params) -> tuple[Frozen, ...]:
        """Returns the parameters of each decoder, prepared for decoding."""
        return self._freeze(params)

    def __call__(self, frozen: tuple[Frozen, ...], feats_IPF: jax.Array, key: jax.Array) -> Decoded:
        """Returns one caption of each image."""
        return self._run(frozen, feats_IPF, key)

    def _generate(self, frozen: tuple[Frozen, ...], feats_IPF: jax.Array, key: jax.Array) -> Decoded:
        decoders = [bind(f.params) for bind, f in zip(self._binds, frozen, strict=True)]
        step = Step(decoders, frozen, feats_IPF, self.length)
        if self._config.method == "beam":
            return beam_search(step, self._config, self._constraints)
        keys_I = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(feats_IPF)))
        return Decoded(*(x[:, 0] for x in one_by_one(step, self._config, self._constraints, keys_I)))


def sample(
    bind: Bind, params: Params, feats_IPF: jax.Array, config: DecodeConfig, keys_I: jax.Array, captions: int
) -> jax.Array:
    """Returns `tokens_ICT`: captions sampled from each image's key. To be called inside `jax.jit`.

    Args:
      bind: of the decoder.
      params: its parameters.
      feats_IPF: features.
      config: `max_length`, and what restricts sampling. `bad_endings` are not removed.
      keys_I: a PRNG key for each image.
      captions: C, captions an image.
    """
    frozen = (freeze(bind, params),)
    step = Step([bind(frozen[0].params)], frozen, feats_IPF, config.max_length)
    return one_by_one(step, config, constraints.of_preset(config), keys_I, captions).tokens_IKT
