"""Captions as flat arrays of token ids."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import Vocabulary


@given(st.lists(st.lists(st.text("ab c"), max_size=3), max_size=6), st.integers(3, 6))
def test_tokens_hold_every_encoded_caption_in_order(captions, max_length):
    vocabulary = Vocabulary.of_captions(["a b"], 10)
    tokens = Tokens.of(captions, vocabulary, max_length)
    flat = [(row, text) for row, texts in enumerate(captions) for text in texts]
    assert tokens.rows.tolist() == [row for row, _ in flat]
    found = [tokens.ids[a:b].tolist() for a, b in zip(tokens.starts[:-1], tokens.starts[1:], strict=True)]
    assert found == [vocabulary.encode(text, max_length) for _, text in flat]
    assert len(tokens.ids) == tokens.starts[-1]
    assert [a.dtype for a in tokens] == [np.int32, np.int64, np.int32]
