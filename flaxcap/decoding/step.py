"""What decoding asks of a model, or of several that decide together: a memory of the images, and a step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.models import output_layer
from flaxcap.models.cell import Carry
from flaxcap.models.recurrent import Bind, Captioner, Params
from flaxcap.text.vocabulary import END

WORDS = END + 1  # the least id of a word: no caption holds the special tokens, but for its <end>
BLOCK = 32  # logits are made of a multiple of so many words


class Decoded(NamedTuple):
    """`tokens_IT` ends with <end>, then <pad>; `alpha_ITP` is where the model looked for each token."""

    tokens_IT: jax.Array  # int32
    log_prob_I: jax.Array  # float32: of the caption and its <end> under the model, in nats
    alpha_ITP: jax.Array  # float32


class Folded(NamedTuple):
    """A model's parameters in the type that it computes in, and what they give for every word."""

    params: Params
    words_VG: jax.Array  # each word's part of the cell's gates
    output: output_layer.Weights  # of whole blocks of words: the last of them may be none, with logits of -inf


def fold(bind: Bind, params: Params) -> Folded:
    """Cast here, once, not in the loop."""
    model = bind(params)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(model.dtype), tree)

    output = output_layer.fold(model.output_weights())
    lacking = -len(output.vocabulary["bias"]) % BLOCK
    vocabulary = {
        "kernel": jnp.pad(output.vocabulary["kernel"], ((0, 0), (0, lacking))),
        "bias": jnp.pad(output.vocabulary["bias"], (0, lacking), constant_values=-jnp.inf),
    }
    output = cast(dataclasses.replace(output, vocabulary=vocabulary))
    output.vocabulary["kernel"] = output.vocabulary["kernel"].astype(model.matmul_dtype)
    return Folded(cast(params), model.word(model.embedding.embedding[...]), output)


class Step:
    """The models over a batch of images, called once a token.

    `carries`, the models' states, is any tuple of arrays `[I, K, ...]` to its users.
    """

    def __init__(self, models: Sequence[Captioner], folded: Sequence[Folded], feats_IPF: jax.Array):
        self._models, self._folded = models, folded
        self._memories = [model.remember(feats_IPF) for model in models]
        self.images, self.positions = self._memories[0].values_IPE.shape[:2]
        self.words = len(folded[0].words_VG)  # V: of all ids

    def start(self, hypotheses: int) -> tuple[Carry, ...]:
        """The states before the first token, of so many captions of each image."""
        pairs = zip(self._models, self._memories, strict=True)
        return tuple(model.start(memory, hypotheses) for model, memory in pairs)

    def __call__(self, carries: tuple[Carry, ...], tokens_IK: jax.Array) -> tuple[tuple, jax.Array, jax.Array]:
        """The next states, what follows (logits, float32, of each beam), and where the models looked, `alpha_IKP`."""
        after, logits, alphas = [], [], []
        for model, f, memory, carry in zip(self._models, self._folded, self._memories, carries, strict=True):
            carry, alpha_IKP, context_IKE = model.cell(memory, carry, f.words_VG[tokens_IK])
            states_IKS = model.deep(carry.hidden_ICH, context_IKE, model.embedding(tokens_IK))
            after.append(carry)
            logits.append(output_layer.logits(f.output, states_IKS.reshape(-1, states_IKS.shape[-1])))
            alphas.append(alpha_IKP)
        if len(logits) == 1:  # of which only the differences matter: nobody needs their normalisation yet
            return tuple(after), logits[0], alphas[0]
        mean_NV = jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(x) for x in logits]), 0) - jnp.log(len(logits))
        return tuple(after), mean_NV, jnp.stack(alphas).mean(0)
