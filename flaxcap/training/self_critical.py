"""Self-critical sequence training: captions that the model draws, weighed by how much better than its others they are.

Rennie et al. 2017 (arXiv:1612.00563): the gradient of the expected CIDEr-D of drawn captions, by REINFORCE. The
baseline of a caption is the mean of the image's other drawn captions (Luo 2020, arXiv:2003.09971). A caption's end
counts as a word of it: without, the reward would not see captions that break off.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flaxcap import config as config_lib
from flaxcap.decoding import generate
from flaxcap.input_pipeline.batching import Batch
from flaxcap.input_pipeline.device_feed import Feed, Inputs, rows
from flaxcap.metrics.cider import Cider
from flaxcap.metrics.ngrams import References
from flaxcap.metrics.ptb import tokenize
from flaxcap.models.recurrent import Bind, Captioner, Params
from flaxcap.text.vocabulary import END, PAD, START, Vocabulary
from flaxcap.training import step as step_lib
from flaxcap.training.state import TrainState

_END = "<end>"


class SelfCritical:
    """Turns a dispatch of batches into one of captions that the model draws for their images."""

    def __init__(
        self,
        bind: Bind,
        config: config_lib.Config,
        mesh: Mesh,
        feed: Feed,
        vocabulary: Vocabulary,
        captions: Sequence[Sequence[str]],
    ):
        """`captions`: the true ones of each row of the store."""
        self._config, self._feed, self._vocabulary = config, feed, vocabulary
        self._lengths = [*feed.lengths, config.decode.max_length + 1]
        self._sample = jax.jit(_make_sample(bind, config, mesh))
        self._references = References([[[*tokenize(text), _END] for text in texts] for texts in captions])
        self._cider = Cider(self._references)

    def __call__(self, state: TrainState, inputs: Inputs, batches: Sequence[Batch]) -> tuple[Inputs, np.ndarray]:
        """The batches of `inputs` with drawn captions in the place of the true ones, and their weights.

        And of each batch the mean CIDEr-D of the captions drawn by this process, float32 [len(batches)].
        """
        with jax.transfer_guard("allow"):
            drawn, longest = self._sample(state.params, inputs.bank_NPF, inputs.index_JI, state.key, state.step)
            tokens_JICT = np.pad(self._feed.local(drawn), [(0, 0)] * 3 + [(1, 0)], constant_values=START)
            rows_JI = self._feed.local_rows(batches)
            tokens_JICT[: len(batches)][rows_JI < 0] = PAD
            weight_JIC = np.zeros(tokens_JICT.shape[:3], np.float32)
            cider_J = np.zeros(len(batches), np.float32)
            for j, rows_I in enumerate(rows_JI):
                weight_JIC[j], cider_J[j] = self._advantages(tokens_JICT[j], rows_I)
            # Of all processes: they must run the same program.
            length = min(n for n in self._lengths if n > int(longest))
            return self._feed.replace(inputs, tokens_JICT[..., :length], weight_JIC), cider_J

    def _advantages(self, tokens_ICT: np.ndarray, rows_I: np.ndarray) -> tuple[np.ndarray, float]:
        """[I, C]: each caption's CIDEr-D above the mean of its image's others, 0 in empty places; and their mean."""
        images, captions = tokens_ICT.shape[:2]
        texts = [self._vocabulary.decode(t) for t in tokens_ICT.reshape(images * captions, -1)]
        words = [[*tokenize(text), _END] for text in texts]
        image_B = np.repeat(np.maximum(rows_I, 0), captions)
        rewards = self._cider.cider_d(self._references.match(words, image_B)).reshape(images, captions)
        others = (rewards.sum(1, keepdims=True) - rewards) / (captions - 1)
        present_I = rows_I >= 0
        mean = float(rewards[present_I].mean()) if present_I.any() else 0.0
        return np.where(present_I[:, None], rewards - others, 0), mean


def make_train_step(
    bind: Bind,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    mesh: Mesh,
    config: config_lib.Train,
) -> Any:
    """The train step without what a recipe adds to the captions' cross-entropy, or hides."""
    plain = dataclasses.replace(
        config,
        dropout=config_lib.Dropout(),
        label_smoothing=0.0,
        doubly_stochastic=0.0,
        scheduled_sampling=0.0,
        hard_reward=0.0,
        hard_entropy=0.0,
    )
    return step_lib.make_train_step(_drawing(bind, config), optimizer, schedule, mesh, plain, 1)


def _drawing(bind: Bind, config: config_lib.Train) -> Bind:
    """The model that captions are drawn from, and that their gradient is taken of: at the preset's temperature.

    What is never drawn (<pad>, <unk>, <start>) has no probability: what lowers the probability of captions that were
    drawn would otherwise raise theirs, without end.
    """

    def bound(params: Params) -> Captioner:
        bias_V = params["vocabulary"]["bias"].at[:END].set(-1e9)
        model = bind(params | {"vocabulary": params["vocabulary"] | {"bias": bias_V}})
        model.temperature = config.cider_temperature
        return model

    return bound


def _make_sample(bind: Bind, config: config_lib.Config, mesh: Mesh) -> Any:
    """`sample(params, bank_NPF, index_JI, key, step) -> tokens_JICT, longest`, each device for its own images.

    `longest`, int32 []: the tokens of the longest caption of all.
    """
    options = config_lib.Decode(method="sample", max_length=config.decode.max_length)
    captions, bind = config.train.captions_per_image, _drawing(bind, config.train)

    def local(params: Params, bank_NPF: jax.Array, index_JI: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
        root = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), step), 1)
        own = index_JI.shape[1]
        place_I = jax.lax.axis_index("data") * own + jnp.arange(own)

        def batch(j_index: tuple[jax.Array, jax.Array]) -> jax.Array:
            j, index_I = j_index
            keys_I = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(root, j), i))(place_I)
            return generate.draw(bind, params, rows(bank_NPF, index_I), options, keys_I, captions)

        tokens_JICT = jax.lax.map(batch, (jnp.arange(len(index_JI)), index_JI))
        return tokens_JICT, jax.lax.pmax((tokens_JICT != PAD).sum(-1).max(), "data")

    specs = P(), P("data"), P(None, "data"), P(), P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(None, "data"), P()), check_vma=False)
