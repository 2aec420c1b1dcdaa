"""Small decoders for the tests of decoding, and plain decoding of one caption, one token at a time."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxcap.config import Config, Decode, Model, Train
from flaxcap.decoding import generate
from flaxcap.decoding.constraints import Constraints
from flaxcap.decoding.step import Decoded
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer
from flaxcap.text.vocabulary import END, PAD, START, UNK

F, V, I, T = 12, 20, 8, 9
WIDTHS: dict[str, Any] = {"image_dim": 6, "embedding_dim": 5, "attention_dim": 7, "hidden_dim": 8, "head_dim": 9}
FEATS_IPF = jax.random.normal(jax.random.key(9), (I, 64, F))


class Small:
    """A decoder with large random parameters: its captions differ, and have different lengths."""

    def __init__(self, vocabulary: int, seed: int = 26, end: float = 1.0, **options: Any):
        precision = {name: options.pop(name) for name in ("dtype", "matmul_dtype") if name in options}
        config = Config(model=Model(**WIDTHS | options), train=Train(**precision))
        self.bind, init = decoder_lib.create(config, decoder_lib.Sizes(64, F, vocabulary))
        leaves, tree = jax.tree.flatten(init(jax.random.key(3)))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noise = [0.8 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        self.params = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
        self.params = self.biased(END=end)
        self.runs: dict[str, Any] = {}

        @jax.jit
        def forced(params: decoder_lib.Params, feats_PF: jax.Array, tokens_T: jax.Array) -> tuple[jax.Array, jax.Array]:
            decoder = self.bind(params)
            states_TICS, alpha_TICP = decoder(feats_PF[None], tokens_T[None, None])
            logits_TV = output_layer.logits(decoder.output_weights(), states_TICS[:, 0, 0])
            return jax.nn.log_softmax(logits_TV), alpha_TICP[:, 0, 0]

        self.forced = forced

    def biased(self, **bias: float) -> decoder_lib.Params:
        """Returns the parameters with numbers added to special tokens' biases, as in `PAD=3.0`."""
        ids = {"PAD": PAD, "UNK": UNK, "START": START, "END": END}
        bias_V = self.params["vocabulary"]["bias"]
        for name, value in bias.items():
            bias_V = bias_V.at[ids[name]].add(value)
        return self.params | {"vocabulary": self.params["vocabulary"] | {"bias": bias_V}}

    def run(self, feats_IPF: Any = FEATS_IPF, params: decoder_lib.Params | None = None, **options: Any) -> Decoded:
        config = Decode(**{"max_length": T, "method": "beam", "beam_width": 3, **options})
        name = str(config)
        if name not in self.runs:
            self.runs[name] = generate.Generator(self.bind, config)
        params = self.params if params is None else params
        generator = self.runs[name]
        return jax.device_get(generator(generator.freeze(params), feats_IPF, jax.random.key(0)))

    def follow(self, image: int, tokens: tuple[int, ...], length: int = T) -> tuple[np.ndarray, np.ndarray]:
        """Runs teacher forcing.

        Returns:
          The log-probabilities `[tokens + 1, V]` after each prefix, and the attention weights `[tokens + 1, P]`.
        """
        padded = np.full(length, PAD)
        padded[: len(tokens) + 1] = START, *tokens
        log_probs, alpha = self.forced(self.params, FEATS_IPF[image], padded)
        return np.array(log_probs)[: len(tokens) + 1], np.array(alpha)[: len(tokens) + 1]


@functools.cache
def small(**options: Any) -> Small:
    return Small(V, **options)


class Ensemble:
    """An ensemble of decoders: a word's probability is the mean of the members' probabilities."""

    def __init__(self, *members: Small):
        self.members = members

    def run(self, **options: Any) -> Decoded:
        config = Decode(**{"max_length": T, "method": "beam", **options})
        generator = generate.Generator([m.bind for m in self.members], config)
        frozen = generator.freeze(*(m.params for m in self.members))
        return jax.device_get(generator(frozen, FEATS_IPF, jax.random.key(0)))

    def follow(self, image: int, tokens: tuple[int, ...], length: int = T) -> tuple[np.ndarray, np.ndarray]:
        log_probs, alphas = zip(*(m.follow(image, tokens, length) for m in self.members), strict=True)
        return np.log(np.mean(np.exp(log_probs), 0)), np.mean(alphas, 0)


def caption(tokens_T: Any) -> tuple[int, ...]:
    """Returns the tokens up to and including the first <end>."""
    return tuple(tokens_T[: int(np.argmax(tokens_T == END)) + 1].tolist())


MODELS = [{}, {"cell": "lstm", "initial_state": "mean", "attention_gate": True, "seed": 12, "end": 0.0}]
WORDS = range(END + 1, V)


def allowed(tokens: Sequence[int], rules: Constraints, words: Sequence[int] = WORDS) -> set[int]:
    """Returns the tokens that may follow a caption's tokens."""
    if len(tokens) == rules.max_length - 1:
        return {END}
    found = set(words)
    if len(tokens) == rules.max_length - 2:
        found -= set(rules.endings)
    if n := rules.no_repeat_ngram:
        runs = {tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)}
        found = {word for word in found if (*tokens[len(tokens) - n + 1 :], word) not in runs}
    may_end = len(tokens) >= rules.min_length and not (tokens and tokens[-1] in rules.endings)
    return found | {END} if may_end or not found else found


def plain_greedy(of: Small | Ensemble, image: int, rules: Constraints) -> tuple[tuple[int, ...], float]:
    """Decodes one image, one token at a time. Returns its caption and the model's log-probability."""
    tokens, log_prob = (), 0.0
    while END not in tokens:
        next_V = of.follow(image, tokens)[0][-1]
        best = max(sorted(allowed(tokens, rules)), key=lambda token: next_V[token])
        tokens, log_prob = (*tokens, best), log_prob + float(next_V[best])
    return tokens, log_prob


def plain_beam_search(
    of: Small | Ensemble, image: int, width: int, penalty: float, rules: Constraints
) -> tuple[tuple[int, ...], float]:
    """Searches for one image, one hypothesis at a time. Returns the best caption and its log-probability.

    Args:
      of: the decoder or ensemble.
      image: the index of the image.
      width: hypotheses.
      penalty: the length penalty.
      rules: the constraints.
    """
    live, ended = [((), 0.0)], []
    for _ in range(rules.max_length):
        after = []
        for tokens, log_prob in live:
            next_V = of.follow(image, tokens)[0][-1]
            after += [((*tokens, token), log_prob + float(next_V[token])) for token in sorted(allowed(tokens, rules))]
        after.sort(key=lambda x: -x[1])
        ended += [x for x in after[:width] if x[0][-1] == END]
        live = [x for x in after if x[0][-1] != END][:width]
        if len(ended) >= width or not live:
            break
    return max(ended, key=lambda x: x[1] / len(x[0]) ** penalty)
