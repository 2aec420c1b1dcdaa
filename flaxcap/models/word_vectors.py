"""Pretrained word vectors, which replace the initial embeddings of known words."""

import functools

import numpy as np
from etils import epath

from flaxcap.errors import UserError
from flaxcap.text.vocabulary import Vocabulary

_LINE_BYTES = 1 << 20  # a line of the widest embedding, 65 536 numbers of 16 bytes


class EmbeddingsError(UserError):
    """A file of word vectors is missing or malformed."""


def read(path: epath.PathLike, vocabulary: Vocabulary, width: int) -> dict[int, np.ndarray]:
    """Returns {token id: float32 [width]} of the words that are both in the vocabulary and in a text file.

    The format is GloVe's (Pennington et al. 2014): a line holds a word and its numbers, separated by spaces. word2vec
    and fastText add a first line with the number of vectors and their width, which is skipped.

    Args:
      path: of the text file, UTF-8.
      vocabulary: of the decoder.
      width: E, the numbers of a vector.

    Raises:
      EmbeddingsError: the file cannot be read, a line is malformed, or no word is in the vocabulary.
    """
    found: dict[int, np.ndarray] = {}
    number = 0
    try:
        with epath.Path(path).open("rb") as file:
            for number, line in enumerate(iter(functools.partial(file.readline, _LINE_BYTES), b""), 1):
                if len(line) == _LINE_BYTES:
                    raise ValueError(f"{_LINE_BYTES} bytes or more")
                word, *values = line.decode().rstrip().split(" ")
                if number == 1 and len(values) == 1:
                    continue
                if (token := vocabulary.id_of_word(word)) is None:
                    continue
                if len(values) != width:
                    raise EmbeddingsError(
                        f"{path}: line {number}: found {len(values)} numbers, expected"
                        f" --config.model.embedding_dim={width}"
                    )
                vector = np.array(values, np.float32)
                if not np.isfinite(vector).all():
                    raise ValueError("a number that is not finite")
                found[token] = vector
    except EmbeddingsError:
        raise
    except OSError as e:
        raise EmbeddingsError(f"--config.model.embeddings={path}: cannot be read ({e.strerror or e})") from e
    except ValueError as e:
        raise EmbeddingsError(f"{path}: line {number}: expected a word and its numbers ({e})") from e
    if not found:
        raise EmbeddingsError(f"{path}: found none of the vocabulary's {len(vocabulary)} words")
    return found
