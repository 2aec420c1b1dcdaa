"""One decoding step of a decoder, or of an ensemble."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.models import output_layer
from flaxcap.models.decoder import Bind, CaptionDecoder, Params
from flaxcap.text.vocabulary import END

FIRST_WORD = END + 1  # the least id of a word: <end> is the only special token that decoding chooses
BLOCK = 32  # logits are computed for a multiple of so many words


class Decoded(NamedTuple):
    """Captions. Tokens end with <end>, then <pad>; attention weights are 0 at <pad>."""

    tokens_IT: jax.Array  # int32
    log_prob_I: jax.Array  # float32: of the caption and its <end>, in nats
    alpha_ITP: jax.Array  # float32


class Frozen(NamedTuple):
    """A decoder's parameters, prepared once for decoding any number of images."""

    params: Params  # in the dtype of the arithmetic
    tables: Any  # see `CaptionDecoder.tables`
    output: output_layer.Weights  # for a multiple of BLOCK words; added words have logits of -inf


def freeze(bind: Bind, params: Params) -> Frozen:
    """Returns parameters, cast once, and products that do not depend on an image."""
    decoder = bind(params)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(decoder.dtype), tree)

    output = cast(output_layer.pad(output_layer.fold(decoder.output_weights()), BLOCK))
    output.vocabulary["kernel"] = output.vocabulary["kernel"].astype(decoder.matmul_dtype)
    return Frozen(cast(params), decoder.tables(), output)


class Step:
    """The decoders of an ensemble over a batch of images.

    `carries` is a tuple of pytrees whose leaves are `[I, K, ...]`; its users know no more of it.
    """

    def __init__(self, decoders: Sequence[CaptionDecoder], frozen: Sequence[Frozen], feats_IPF: jax.Array, length: int):
        """Computes the memories of the images. `length`: most tokens of a caption."""
        self._decoders, self._frozen, self._length = decoders, frozen, length
        self._memories = [decoder.remember(feats_IPF) for decoder in decoders]
        self.images, self.positions = feats_IPF.shape[:2]
        self.words = decoders[0].sizes.vocabulary  # V

    def start(self, hypotheses: int) -> tuple[Any, ...]:
        """Returns the carries before the first token, for so many hypotheses an image."""
        pairs = zip(self._decoders, self._memories, strict=True)
        return tuple(decoder.start(memory, hypotheses, self._length) for decoder, memory in pairs)

    def __call__(
        self, carries: tuple[Any, ...], tokens_IK: jax.Array, t: jax.Array
    ) -> tuple[tuple, jax.Array, jax.Array]:
        """Returns the next carries, the logits that follow, float32 `logits_BV`, and `alpha_IKP`.

        An ensemble's probabilities and attention weights are the means of its members'.
        """
        after, logits, alphas = [], [], []
        for decoder, frozen, memory, carry in zip(self._decoders, self._frozen, self._memories, carries, strict=True):
            carry, states_IKS, alpha_IKP = decoder.step(frozen.tables, memory, carry, tokens_IK, t)
            after.append(carry)
            logits.append(output_layer.logits(frozen.output, states_IKS.reshape(-1, states_IKS.shape[-1])))
            alphas.append(alpha_IKP)
        if len(logits) == 1:  # its users normalise, where they need to
            return tuple(after), logits[0], alphas[0]
        mean_BV = jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(x) for x in logits]), 0) - jnp.log(len(logits))
        return tuple(after), mean_BV, jnp.stack(alphas).mean(0)
