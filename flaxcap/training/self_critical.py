"""Self-critical sequence training: sampled captions, weighted by their CIDEr-D above that of the image's others.

Rennie et al. 2017 (arXiv:1612.00563) estimate the gradient of the expected CIDEr-D of sampled captions by REINFORCE.
The baseline of a caption is the mean of the image's other samples (Luo 2020, arXiv:2003.09971). <end> counts as a word:
without it the reward would not notice captions that break off.
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

from flaxcap.config import Config, ConfigError, Decode, Dropout, Train
from flaxcap.decoding import generate
from flaxcap.input_pipeline import device_feed
from flaxcap.input_pipeline.batching import Batch
from flaxcap.input_pipeline.device_feed import Feed, Inputs
from flaxcap.metrics.cider import Cider
from flaxcap.metrics.ngrams import References
from flaxcap.metrics.units import unit_of
from flaxcap.models import output_layer
from flaxcap.models.decoder import Bind, Params, with_output
from flaxcap.text.vocabulary import END, PAD, START, Vocabulary
from flaxcap.training import step as step_lib
from flaxcap.training.state import TrainState

_END = "<end>"


class SelfCritical:
    """Replaces the true captions of a dispatch by captions that the model samples."""

    def __init__(
        self,
        bind: Bind,
        config: Config,
        mesh: Mesh,
        feed: Feed,
        vocabulary: Vocabulary,
        captions: Sequence[Sequence[str]],
    ):
        """Counts the n-grams of the true captions.

        Args:
          bind: of the decoder.
          config: `train.captions_per_image`, `train.cider_temperature` and `decode.max_length`.
          mesh: of all devices.
          feed: of the training split.
          vocabulary: of the data set.
          captions: the true captions of each row of the store.

        Raises:
          ConfigError: no words tell the images apart, so that every caption's reward is 0.
        """
        self._config, self._feed, self._vocabulary = config, feed, vocabulary
        self._lengths = [*feed.lengths, config.decode.max_length + 1]
        self._sample = jax.jit(_make_sample(bind, config, mesh))
        self._tokenize = unit_of(captions).tokenize
        self._references = References([[[*self._tokenize(text), _END] for text in texts] for texts in captions])
        self._cider = Cider(self._references)
        if not self._cider.informative:
            raise ConfigError(
                f"--config.train.cider_epochs={config.train.cider_epochs}: found {len(captions)} training images whose"
                " captions are alike, so that every caption has a CIDEr of 0; expected images with different captions"
            )

    def __call__(self, state: TrainState, inputs: Inputs, batches: Sequence[Batch]) -> tuple[Inputs, np.ndarray]:
        """Returns the inputs with sampled captions and their weights.

        Args:
          state: whose parameters sample.
          inputs: of the dispatch.
          batches: of the dispatch.

        Returns:
          The inputs, and for each batch the mean CIDEr-D of this process's samples, float32 [len(batches)].
        """
        return self.weigh(inputs, batches, *self.sample(state, inputs))

    def sample(self, state: TrainState, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Returns `tokens_JICT`, sampled on the devices, and the tokens of the longest caption, int32 []."""
        with jax.transfer_guard("allow"):
            return self._sample(state.params, inputs.bank_NPF, inputs.index_JI, state.key, state.step)

    def weigh(
        self, inputs: Inputs, batches: Sequence[Batch], sampled: jax.Array, longest: jax.Array
    ) -> tuple[Inputs, np.ndarray]:
        """Scores sampled captions on the host.

        Args:
          inputs: of the dispatch.
          batches: of the dispatch.
          sampled: `tokens_JICT`.
          longest: tokens of the longest caption of all processes.

        Returns:
          The result of `__call__`.
        """
        with jax.transfer_guard("allow"):
            tokens_JICT = np.pad(self._feed.local(sampled), [(0, 0)] * 3 + [(1, 0)], constant_values=START)
            rows_JI = self._feed.local_rows(batches)
            tokens_JICT[: len(batches)][rows_JI < 0] = PAD
            weight_JIC = np.zeros(tokens_JICT.shape[:3], np.float32)
            cider_J = np.zeros(len(batches), np.float32)
            for j, rows_I in enumerate(rows_JI):
                weight_JIC[j], cider_J[j] = self._advantages(tokens_JICT[j], rows_I)
            # `longest` is that of all processes: they must run the same program.
            length = min(n for n in self._lengths if n > int(longest))
            return self._feed.replace(inputs, tokens_JICT[..., :length], weight_JIC), cider_J

    def _advantages(self, tokens_ICT: np.ndarray, rows_I: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns each caption's CIDEr-D above the mean of its image's others, `[I, C]`, and the mean CIDEr-D.

        Rows of -1 are padding; their advantages are 0.
        """
        images, captions = tokens_ICT.shape[:2]
        texts = [self._vocabulary.decode(t) for t in tokens_ICT.reshape(images * captions, -1)]
        words = [[*self._tokenize(text), _END] for text in texts]
        image_B = np.repeat(np.maximum(rows_I, 0), captions)
        rewards = self._cider.cider_d(self._references.match(words, image_B)).reshape(images, captions)
        others = (rewards.sum(1, keepdims=True) - rewards) / (captions - 1)
        present_I = rows_I >= 0
        mean = float(rewards[present_I].mean()) if present_I.any() else 0.0
        return np.where(present_I[:, None], rewards - others, 0), mean


def make_train_step(
    bind: Bind, optimizer: optax.GradientTransformationExtraArgs, schedule: optax.Schedule, mesh: Mesh, config: Train
) -> Any:
    """Returns the train step of sampled captions: their cross-entropy, without dropout or additional terms.

    Args and result are those of `step.make_train_step`.
    """
    plain = dataclasses.replace(
        config,
        dropout=Dropout(),
        label_smoothing=0.0,
        doubly_stochastic=0.0,
        scheduled_sampling=0.0,
        hard_reward=0.0,
        hard_entropy=0.0,
    )
    return step_lib.make_train_step(_sampling(bind, config), optimizer, schedule, mesh, plain, 1)


def _sampling(bind: Bind, config: Train) -> Bind:
    """Returns a bind of the distribution that captions are sampled from, at the preset's temperature.

    <pad>, <unk> and <start> are never sampled, so they have no probability. Otherwise their probability would grow
    without end: a step that makes a sampled caption less probable makes everything else more probable.
    """

    def change(weights: output_layer.Weights) -> output_layer.Weights:
        return output_layer.divide(output_layer.exclude(weights, slice(END)), config.cider_temperature)

    return with_output(bind, change)


def _make_sample(bind: Bind, config: Config, mesh: Mesh) -> Any:
    """Returns `sample(params, bank_NPF, index_JI, key, step) -> tokens_JICT, longest`.

    Each device samples for its own images. `longest`, int32 []: the tokens of the longest caption of all devices.
    `decode.min_length`, `no_repeat_ngram` and `bad_endings` do not apply: the gradient needs samples of the model's own
    distribution. Their faults lower the reward.
    """
    options = Decode(method="sample", max_length=config.decode.max_length)
    captions, bind = config.train.captions_per_image, _sampling(bind, config.train)

    def local(params: Params, bank_NPF: jax.Array, index_JI: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
        root = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), step), 1)
        own = index_JI.shape[1]
        image_I = jax.lax.axis_index("data") * own + jnp.arange(own)

        def batch(j_index: tuple[jax.Array, jax.Array]) -> jax.Array:
            j, index_I = j_index
            keys_I = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(root, j), i))(image_I)
            feats_IPF = device_feed.rows(bank_NPF, index_I)
            return generate.sample(bind, params, feats_IPF, options, keys_I, captions)

        tokens_JICT = jax.lax.map(batch, (jnp.arange(len(index_JI)), index_JI))
        return tokens_JICT, jax.lax.pmax((tokens_JICT != PAD).sum(-1).max(), "data")

    specs = P(), P("data"), P(None, "data"), P(), P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(None, "data"), P()), check_vma=False)
