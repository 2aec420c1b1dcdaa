"""Constraints on captions: each step's logits, restricted by the tokens so far.

Greedy decoding, sampling and beam search choose from the restricted logits. The log-probabilities that they report are
those of the unrestricted ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcap.config import ConfigError, Decode
from flaxcap.decoding.step import FIRST_WORD
from flaxcap.text import function_words
from flaxcap.text.vocabulary import END, PAD, Vocabulary
from flaxcap.text.words import words


class Constraints(NamedTuple):
    """The constraints of a preset. A constraint that is off adds no operation to the program.

    Attributes:
      max_length: most tokens, <end> included. The last token is always <end>.
      min_length: fewest tokens before <end>.
      no_repeat_ngram: length of runs of tokens that occur once at most; 0: any run may.
      endings: ids of tokens that <end> cannot follow.
    """

    max_length: int
    min_length: int = 0
    no_repeat_ngram: int = 0
    endings: tuple[int, ...] = ()

    def restrict(self, logits_BV: jax.Array, tokens_IKT: jax.Array, last_IK: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the logits of token t, -inf where a constraint forbids the token.

        A caption for which nothing would be left may end.

        Args:
          logits_BV: of the decoder, for each caption of each image. Special tokens other than <end> are left as they
            are: no decoding method chooses them.
          tokens_IKT: int32, the captions; <pad> from t on.
          last_IK: int32, token t - 1 of each caption.
          t: int32 [], the number of tokens so far.
        """
        logits_BV = self._without_repeats(logits_BV, tokens_IKT, t)
        if not self.min_length and not self.endings:
            return logits_BV
        too_early_B = jnp.broadcast_to(t < self.min_length, logits_BV.shape[:1])
        if self.endings:
            endings = jnp.array(self.endings, jnp.int32)
            too_early_B |= (last_IK.reshape(-1, 1) == endings[None]).any(-1)
            # After the last word <end> is forced.
            logits_BV = logits_BV.at[:, endings].add(jnp.where(t == self.max_length - 2, -jnp.inf, 0))
        any_word_B = (logits_BV[:, FIRST_WORD:] > -jnp.inf).any(-1)
        forbidden_B = too_early_B & any_word_B & (t < self.max_length - 1)
        return logits_BV.at[:, END].add(jnp.where(forbidden_B, -jnp.inf, 0))

    def _without_repeats(self, logits_BV: jax.Array, tokens_IKT: jax.Array, t: jax.Array) -> jax.Array:
        """Forbids the tokens that would, as token t, complete a run of `no_repeat_ngram` for the second time."""
        n, starts = self.no_repeat_ngram, self.max_length - self.no_repeat_ngram
        if not n or starts <= 0:
            return logits_BV
        recent = jax.lax.dynamic_slice_in_dim(tokens_IKT, t - n + 1, n - 1, 2)
        repeats = (jnp.arange(starts) <= t - n)[None, None]
        for k in range(n - 1):
            repeats &= tokens_IKT[..., k : k + starts] == recent[..., k : k + 1]
        ids = jnp.where(repeats, tokens_IKT[..., n - 1 : n - 1 + starts], PAD).reshape(len(logits_BV), -1)
        return jax.vmap(lambda x, ids: x.at[ids].set(-jnp.inf))(logits_BV, ids)


def of_preset(config: Decode, vocabulary: Vocabulary | None = None) -> Constraints:
    """Returns the constraints of a preset.

    Args:
      config: its fields.
      vocabulary: gives the ids of `decode.bad_endings`; None: there are none.

    Raises:
      ConfigError: no word of `decode.bad_endings` is in the vocabulary.
    """
    found = Constraints(config.max_length, config.min_length, config.no_repeat_ngram)
    if not config.bad_endings or vocabulary is None:
        return found
    named = function_words.ENGLISH if config.bad_endings == "english" else words(config.bad_endings)
    # A word of several tokens, as byte pair encoding makes rare ones, cannot be told by the last token.
    endings = sorted({n for word in named if (n := vocabulary.id_of_word(word)) is not None})
    if not endings:
        raise ConfigError(
            f"--config.decode.bad_endings={config.bad_endings}: found none of these words in the vocabulary, expected"
            " english, or words of the captions separated by spaces"
        )
    return found._replace(endings=tuple(endings))
