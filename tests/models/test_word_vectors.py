"""Word vectors from a text file replace the embeddings of known words. Errors name the file and the line."""

import pathlib

import jax
import numpy as np
import pytest
from tiny_store import tiny_config, write_store

from flaxcap.commands import train
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import word_vectors
from flaxcap.models.word_vectors import EmbeddingsError
from flaxcap.text.vocabulary import SPECIAL, Vocabulary
from flaxcap.training.checkpoints import Checkpoints

WORDS = Vocabulary([*SPECIAL, "dog", "cat", "café"])


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    file = path / "vectors.txt"
    file.write_text(text)
    return file


@pytest.mark.parametrize("header", ["", "4 3\n"])
def test_the_vectors_of_known_words_are_read(tmp_path, header):
    file = write(tmp_path, header + "the 9 9 9\ndog 1 2.5 -3e-1\ncafé 0 0 1\n. 1 1 1\n")
    found = word_vectors.read(file, WORDS, 3)
    assert {WORDS.tokens[i]: v.tolist() for i, v in found.items()} == {
        "dog": [1, 2.5, np.float32(-0.3)],
        "café": [0, 0, 1],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog 1 2\n", "line 1: found 2 numbers, expected --config.model.embedding_dim=3"),
        ("the 1 2 3\ndog 1 two 3\n", "line 2: expected a word and its numbers"),
        ("dog 1 nan 3\n", "line 1: expected a word and its numbers"),
        ("the 1 2 3\n", "found none of the vocabulary's 7 words"),
        ("", "found none"),
    ],
)
def test_an_error_names_the_file_and_the_line(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(EmbeddingsError, match=message) as error:
        word_vectors.read(file, WORDS, 3)
    assert str(file) in str(error.value)


def test_an_error_names_a_missing_or_binary_file(tmp_path):
    with pytest.raises(EmbeddingsError, match=r"model\.embeddings=.*nothere.*cannot be read"):
        word_vectors.read(tmp_path / "nothere", WORDS, 3)
    (tmp_path / "binary").write_bytes(b"dog 1 2 3\n\xff\xfe 1 2 3\n")
    with pytest.raises(EmbeddingsError, match="line 2: expected"):
        word_vectors.read(tmp_path / "binary", WORDS, 3)


def test_a_run_starts_with_the_vectors(tmp_path, capsys):
    config = tiny_config(epochs=1, learning_rate=1e-9, warmup_steps=0)
    config.model.embeddings = str(write(tmp_path, "dog 1 2 3 4 5\nelsewhere 1 1 1 1 1\ncat 5 4 3 2 1\n"))
    prepared = write_store(tmp_path, config)
    train.train(config, tmp_path / "run", tmp_path)
    assert "2 of" in capsys.readouterr().out
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    words, step = prepared.vocabulary(), checkpoints.latest_step
    assert step
    _, init = decoder_lib.create(config, decoder_lib.Sizes(prepared.positions, prepared.feature_dim, len(words)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(init, jax.random.key(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    table_VE = np.asarray(checkpoints.restore_params(like, step)["embedding"]["embedding"])
    checkpoints.close()
    np.testing.assert_allclose(table_VE[words.ids["dog"]], [1, 2, 3, 4, 5], atol=1e-5)
    np.testing.assert_allclose(table_VE[words.ids["cat"]], [5, 4, 3, 2, 1], atol=1e-5)
    assert abs(table_VE[words.ids["runs"]]).max() < 0.2
