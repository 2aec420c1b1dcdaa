"""A decoder defined here alone passes through prepare, train, evaluate, caption, export and bench."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trained import tiny_config

from flaxcap import presets
from flaxcap.commands.main import main
from flaxcap.config import Config, Model
from flaxcap.models import decoder, dropout, output_layer
from flaxcap.models.decoder import Sizes
from flaxcap.text.vocabulary import START

pytestmark = pytest.mark.usefixtures("without_java")


class Carry(NamedTuple):
    """The sum of the embeddings so far."""

    sum_ICE: jax.Array


class BagOfWords(nnx.Module):
    """The next word follows from the mean feature and the sum of the words so far; attention is uniform."""

    def __init__(self, config: Model, sizes: Sizes, dtype: Any, matmul_dtype: str = "", *, rngs: nnx.Rngs):
        self.sizes, self.dtype = sizes, jnp.dtype(dtype)
        self.matmul_dtype = matmul_dtype or str(self.dtype)
        options = {"dtype": self.dtype, "param_dtype": jnp.float32, "rngs": rngs}
        self.image = nnx.Linear(sizes.features, config.embedding_dim, **options)
        self.words = nnx.Embed(sizes.vocabulary, config.embedding_dim, **options)
        self.head = nnx.Linear(config.embedding_dim, config.head_dim, **options)
        self.logits = nnx.Linear(config.head_dim, sizes.vocabulary, **options)

    def remember(self, feats_IPF: jax.Array) -> jax.Array:
        return self.image(feats_IPF.astype(self.dtype).mean(1))

    def start(self, memory: jax.Array, captions: int, length: int) -> Carry:
        return Carry(jnp.zeros((len(memory), captions, memory.shape[-1]), self.dtype))

    def tables(self) -> None:
        return None

    def step(self, tables: None, memory: jax.Array, carry: Carry, tokens_IK: jax.Array, t: jax.Array) -> Any:
        carry = Carry(carry.sum_ICE + self.words(tokens_IK))
        return carry, jnp.tanh(memory[:, None] + carry.sum_ICE), self._uniform(tokens_IK.shape)

    def __call__(self, feats_IPF: jax.Array, tokens_ICT: jax.Array, noise: jax.Array | None = None) -> Any:
        sum_TICE = self.words(jnp.moveaxis(tokens_ICT, 2, 0)).cumsum(0)
        states_TICE = dropout.apply(jnp.tanh(self.remember(feats_IPF)[None, :, None] + sum_TICE), noise)
        return states_TICE, self._uniform(states_TICE.shape[:3])

    def _uniform(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.full((*shape, self.sizes.positions), 1 / self.sizes.positions)

    def output_weights(self) -> output_layer.Weights:
        head, logits = (nnx.to_pure_dict(nnx.state(layer)) for layer in (self.head, self.logits))
        return output_layer.Weights(head, logits, True, self.matmul_dtype)

    def draw_noise(self, keys_I: jax.Array, captions: int, time: int, dropout_config: Any) -> jax.Array | None:
        shape = time, captions, self.head.in_features
        return dropout.mask(keys_I, 0, dropout_config.output, shape, self.dtype, 1)

    def auxiliary_loss(self, *_: Any) -> float:
        return 0.0

    @staticmethod
    def with_word_vectors(params: Any, vectors: dict[int, np.ndarray]) -> Any:
        table = np.array(params["words"]["embedding"])
        table[list(vectors)] = list(vectors.values())
        return params | {"words": {"embedding": table}}

    @staticmethod
    def flops(config: Model, *, images: int, tokens: int, positions: int, features: int, vocabulary: int) -> int:
        token = config.embedding_dim * config.head_dim + config.head_dim * vocabulary
        return 2 * (images * features * config.embedding_dim + tokens * token)


@pytest.fixture(scope="module", autouse=True)
def registered():
    decoder.register("bag_of_words", BagOfWords)
    yield
    del decoder._DECODERS["bag_of_words"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a preset of the decoder."""
    path = tmp_path_factory.mktemp("toy")
    config = tiny_config()
    config.model.name = "bag_of_words"
    (path / "preset.json").write_text(presets.to_json(config))
    return path


def test_every_command_takes_it(place, capsys):
    preset, data = f"--config={place / 'preset.json'}", f"--data_dir={place / 'data'}"
    run = f"--workdir={place / 'run'}"
    assert main(["prepare", preset, data]) == 0
    vectors = place / "vectors.txt"
    vectors.write_text("a " + " ".join(["0.5"] * tiny_config().model.embedding_dim) + "\n")
    assert main(["train", preset, data, run, f"--config.model.embeddings={vectors}"]) == 0
    assert main(["evaluate", data, run, "--split=test"]) == 0
    assert main(["evaluate", data, run, "--split=test", "--config.decode.method=beam"]) == 0
    assert main(["export", data, run, f"--out={place / 'export'}"]) == 0
    capsys.readouterr()
    plots = ["--plot", f"--out_dir={place}"]
    assert main(["caption", data, run, "--split=val", "--num_images=2", *plots]) == 0
    captions = capsys.readouterr().out
    assert main(["caption", data, f"--model={place / 'export'}", "--split=val", "--num_images=2", *plots]) == 0
    assert capsys.readouterr().out == captions
    assert captions.count("log-probability") == 2


@pytest.mark.parametrize("what", ["train", "decode"])
def test_it_is_benchmarked(place, what, capsys):
    sizes = ["--images=32", "--steps=2", "--repeats=1", "--warmup=1", "--config.train.batch_images=16"]
    assert main(["bench", what, f"--config={place / 'preset.json'}", *sizes]) == 0
    assert "captions_s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["recurrent", "bag_of_words"])
def test_teacher_forced_logits_equal_stepwise_logits(name):
    """Any decoder's two ways through a caption agree."""
    config = Config(model=Model(name, image_dim=6, embedding_dim=7, attention_dim=5, hidden_dim=8, head_dim=9))
    bind, init = decoder.create(config, Sizes(positions=4, features=10, vocabulary=32))
    model = bind(init(jax.random.key(0)))
    feats_IPF = jax.random.normal(jax.random.key(1), (3, 4, 10))
    tokens_ICT = jax.random.randint(jax.random.key(2), (3, 2, 6), 4, 32).at[..., 0].set(START)
    states_TICS, alpha_TICP = model(feats_IPF, tokens_ICT)
    expected = output_layer.logits(model.output_weights(), states_TICS)
    memory, tables = model.remember(feats_IPF), model.tables()
    carry = model.start(memory, 2, 6)
    for t in range(6):
        carry, states_ICS, alpha_ICP = model.step(tables, memory, carry, tokens_ICT[..., t], jnp.int32(t))
        logits = output_layer.logits(model.output_weights(), states_ICS)
        np.testing.assert_allclose(logits, expected[t], atol=1e-5)
        np.testing.assert_allclose(alpha_ICP, alpha_TICP[t], atol=1e-6)
        assert len({x.shape[:2] for x in jax.tree.leaves(carry)}) == 1
