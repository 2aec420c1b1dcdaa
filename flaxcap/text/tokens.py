"""The token ids of many captions in three flat arrays."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flaxcap.text.vocabulary import Vocabulary


class Tokens(NamedTuple):
    """The token ids of a split's captions, ragged.

    Caption m has the ids `ids[starts[m]:starts[m + 1]]` and describes the image of row `rows[m]`.
    """

    ids: np.ndarray  # int32 [all tokens]
    starts: np.ndarray  # int64 [captions + 1]
    rows: np.ndarray  # int32 [captions], not decreasing

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]], vocabulary: Vocabulary, max_length: int) -> "Tokens":
        """Encodes the captions of every image.

        Args:
          captions: for each image, in the store's order, its captions.
          vocabulary: gives each word its id.
          max_length: ids of a caption, <start> and <end> included; further words are dropped.
        """
        ids: list[int] = []
        starts, rows = [0], []
        for row, texts in enumerate(captions):
            for text in texts:
                ids += vocabulary.encode(text, max_length)
                starts.append(len(ids))
                rows.append(row)
        return cls(np.array(ids, np.int32), np.array(starts, np.int64), np.array(rows, np.int32))
