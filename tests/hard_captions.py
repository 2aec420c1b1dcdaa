"""Captions for property tests: any text, and text of characters that are hard to split into words."""

from hypothesis import strategies as st

# Letters whose length or accents change in lower case or in NFC; joiners, text directions, punctuation, a surrogate.
HARD = "aAzß ẞIİıΣςÉE\u0301J\u030c\u212a\u1fbc\u0345'’‘`´-_.,<>#\n\t\u00a0\u2028\u200d\u200f\u0600\ud800👍🏽שم日½①"
CAPTIONS = st.text() | st.text(HARD)
