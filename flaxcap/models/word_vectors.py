"""Word vectors made elsewhere, to start a decoder's embedding with."""

import functools

import numpy as np
from etils import epath

from flaxcap.errors import UserError
from flaxcap.text.vocabulary import Vocabulary

_LINE_BYTES = 1 << 20  # the widest model's takes less


class EmbeddingsError(UserError):
    """A file of word vectors that cannot be used."""


def read(path: epath.PathLike, vocabulary: Vocabulary, width: int) -> dict[int, np.ndarray]:
    """{token id: float32 [width]} of the vocabulary's words that a text file in GloVe's format has vectors for.

    A line holds a word and its numbers, separated by spaces (Pennington et al. 2014); a first line with the number of
    vectors and their width, as word2vec and fastText write it, is passed over. EmbeddingsError names the file and the
    line that cannot be read, and a file that knows none of the words.
    """
    found: dict[int, np.ndarray] = {}
    number = 0
    try:
        with epath.Path(path).open("rb") as file:
            for number, line in enumerate(iter(functools.partial(file.readline, _LINE_BYTES), b""), 1):
                if len(line) == _LINE_BYTES:
                    raise ValueError(f"of {_LINE_BYTES} bytes or more")
                word, *values = line.decode().rstrip().split(" ")
                if number == 1 and len(values) == 1:
                    continue
                if word not in vocabulary.ids:
                    continue
                if len(values) != width:
                    raise EmbeddingsError(
                        f"{path}: line {number} has {len(values)} numbers, expected as many as"
                        f" --config.model.embedding_dim={width}"
                    )
                vector = np.array(values, np.float32)
                if not np.isfinite(vector).all():
                    raise ValueError("a number that is not finite")
                found[vocabulary.ids[word]] = vector
    except EmbeddingsError:
        raise
    except OSError as e:
        raise EmbeddingsError(f"--config.model.embeddings={path}: cannot be read ({e.strerror or e})") from e
    except ValueError as e:
        raise EmbeddingsError(f"{path}: line {number} is not a word and its numbers ({e})") from e
    if not found:
        raise EmbeddingsError(f"{path}: has none of the vocabulary's {len(vocabulary)} words")
    return found
