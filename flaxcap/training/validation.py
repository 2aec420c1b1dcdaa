"""Validation on a prepared split: the loss of the true captions, and generated captions with their CIDEr."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flaxcap.config import Config
from flaxcap.decoding.generate import Frozen, Generator
from flaxcap.features.shards import Split
from flaxcap.input_pipeline.batching import Batch, Plan
from flaxcap.input_pipeline.device_feed import Feed, Source
from flaxcap.metrics import scorer
from flaxcap.models.decoder import Params
from flaxcap.runtime import devices, sharding
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import Vocabulary
from flaxcap.training.finetune import TrainingSource

Read = Callable[[Sequence[int]], np.ndarray]  # rows -> features [len(rows), P, F]


class Interrupted(Exception):
    """A validation was interrupted before it had a result."""


class Captions(NamedTuple):
    """The generated captions of some images, in the order of the images."""

    texts: list[str]
    log_probs: list[float]  # in nats, <end> included


def make_feed(
    config: Config,
    split: Split,
    vocabulary: Vocabulary,
    mesh: Mesh,
    batches_per_dispatch: int = 1,
    source: Source | None = None,
    frozen: Any = None,
) -> tuple[Plan, Feed]:
    """Returns the batches of a prepared split, and the feed that puts them on the mesh.

    Args:
      config: the preset.
      split: of the store.
      vocabulary: of the store.
      mesh: devices of the run.
      batches_per_dispatch: most batches of a dispatch.
      source: images that replace the features of the split; None: the features.
      frozen: the encoder's frozen parameters, see `Inputs`.
    """
    captions = (row.captions for row in split.rows)
    plan = Plan(
        Tokens.of(captions, vocabulary, config.data.max_length),
        batch_images=config.train.batch_images,
        captions_per_image=config.train.captions_per_image,
        num_buckets=config.train.num_buckets,
        batches_per_dispatch=batches_per_dispatch,
        seed=config.seed,
        skip={s.row for s in split.skipped()},
    )
    return plan, Feed(source or split, plan, mesh, config.train.features, frozen)


def cross_entropy(
    eval_step: Callable, params: Params, plan: Plan, feed: Feed, check: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Returns nats per token and teacher-forced accuracy over all captions of a plan; each counts once.

    Args:
      eval_step: of `step.make_eval_step`.
      params: of the decoder, and of a trained encoder.
      plan: batches of the split.
      feed: of the same plan.
      check: called before each batch; may raise.
    """

    def batch(n: int) -> list[Batch]:
        check()
        return [plan.in_order(n)]

    batches = map(batch, range(plan.steps_per_epoch))
    sums = jax.device_get([eval_step(params, inputs) for _, inputs in feed.ahead(batches)])
    nats, tokens, right = (math.fsum(column) for column in zip(*sums, strict=True))
    return nats / tokens, right / tokens


def captions_of(
    generator: Generator,
    frozen: tuple[Frozen, ...],
    vocabulary: Vocabulary,
    rows: Sequence[int],
    read: Read,
    batch_size: int,
    seed: int = 0,
) -> Captions:
    """Returns generated captions of images. Each process generates a share; all processes get all captions.

    Args:
      generator: decodes a batch of features.
      frozen: parameters of `generator.freeze`.
      vocabulary: of the model.
      rows: the images.
      read: returns the features of rows.
      batch_size: images that are decoded together, over the devices of a process.
      seed: of sampling.
    """
    mesh = sharding.make_mesh(jax.local_devices())
    size = -(-batch_size // mesh.size) * mesh.size
    frozen = jax.device_put(jax.tree.map(_here, frozen), sharding.replicated(mesh))
    starts = range(0, len(rows), size)
    mine = [n for n in range(len(starts)) if n % jax.process_count() == jax.process_index()]
    found, running = [], None
    with jax.transfer_guard("allow"):
        for n in tqdm.tqdm(mine, "caption", unit=" batches", disable=None, leave=False):
            some = list(rows[starts[n] : starts[n] + size])
            feats_IPF = read(some + some[-1:] * (size - len(some)))
            placed = jax.device_put(feats_IPF, sharding.over_images(mesh))
            key = jax.random.fold_in(jax.random.key(seed), starts[n])
            out = generator(frozen, placed, key)
            if running is not None:  # fetches the last batch, while the device computes this one
                found.append(jax.device_get(running))
            running = out.tokens_IT, out.log_prob_I
        if running is not None:
            found.append(jax.device_get(running))
    if jax.process_count() > 1:
        found = _exchange(found, len(starts), size, generator.length)
    tokens = [tokens_T for tokens_IT, _ in found for tokens_T in tokens_IT][: len(rows)]
    log_probs = [float(x) for _, log_prob_I in found for x in log_prob_I][: len(rows)]
    return Captions([vocabulary.decode(t) for t in tokens], log_probs)


def _here(x: jax.Array) -> np.ndarray:
    """Returns a replicated array, from the first device of this process."""
    return np.asarray(x.addressable_data(0))


def _exchange(mine: list, batches: int, size: int, length: int) -> list:
    """Returns the batches of all processes in order.

    Args:
      mine: results of this process, whose index is the batch's number modulo the number of processes.
      batches: number of batches of all processes.
      size: images of a batch.
      length: tokens of a caption.
    """
    processes = jax.process_count()
    most = -(-batches // processes)
    empty = np.zeros((size, length), np.int32), np.zeros(size, np.float32)
    padded = mine + [empty] * (most - len(mine))
    gathered = multihost_utils.process_allgather(jax.tree.map(lambda *x: np.stack(x), *padded))
    return [tuple(part[n % processes, n // processes] for part in gathered) for n in range(batches)]


def _can_rise(
    scored: scorer.Scorer, references: Sequence[Sequence[str]], vocabulary: Vocabulary, max_length: int
) -> bool:
    """Returns True if a caption that the model can write has a CIDEr above 0.

    The best captions are the references themselves, as far as the vocabulary has their words.

    Args:
      scored: the scorer of the references.
      references: for each image, its captions.
      vocabulary: of the model.
      max_length: ids of a caption.
    """
    candidates = ((n, text) for n, some in enumerate(references) for text in some)
    while some := list(itertools.islice(candidates, 256)):
        texts = [vocabulary.decode(vocabulary.encode(text, max_length)) for _, text in some]
        if scored.cider(texts, [n for n, _ in some]).any():
            return True
    return False


class Validation:
    """The validation of a run on one split.

    Attributes:
      follows_cider: True if the CIDEr can rise. It cannot for a single image, nor if all images have the same captions.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        vocabulary: Vocabulary,
        mesh: Mesh,
        generator: Generator,
        eval_step: Callable,
        training_source: TrainingSource,
    ):
        """Prepares the batches and the references.

        Args:
          config: the preset.
          split: of the store.
          vocabulary: of the store.
          mesh: devices of the run.
          generator: generates captions.
          eval_step: of `step.make_eval_step`.
          training_source: features of the store, or images and a trained encoder.
        """
        source, frozen, encode = training_source.sources.get("val"), training_source.frozen, training_source.encode
        self._config, self._rows, self._vocabulary = config, split.present(), vocabulary
        self._generator, self._eval_step = generator, eval_step
        self._source, self._frozen = source or split, frozen
        self._encode = encode and jax.jit(encode, compiler_options=devices.convolving())
        self._plan, self._feed = make_feed(config, split, vocabulary, mesh, source=source, frozen=frozen)
        references = [split.rows[row].captions for row in self._rows]
        self._scorer = scorer.Scorer(references)
        self.unit = self._scorer.unit.name  # "words" or "characters": what CIDEr counts
        self.follows_cider = _can_rise(self._scorer, references, vocabulary, config.data.max_length)

    def score(self, found: dict[str, float]) -> float:
        """Returns the number that rises with a better model: the CIDEr, or minus the loss where no CIDEr can rise.

        Args:
          found: of a call.
        """
        return found["cider"] if self.follows_cider else -found["loss"]

    def notice(self) -> str:
        """Returns a line for the start of a run that follows the loss, "" for one that follows the CIDEr."""
        if self.follows_cider:
            return ""
        count = len(self._rows)
        reason = "it has one image" if count == 1 else f"no words that the model knows tell its {count} images apart"
        return (
            f"the CIDEr of the validation split is always 0, because {reason}: the best checkpoint, early stopping and"
            " the plateau schedule follow the validation loss"
        )

    def __call__(self, params: Params, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Returns "loss" (nats per token) and "accuracy" of the true captions, and the "cider" of generated ones.

        Args:
          params: of the decoder, and of a trained encoder.
          stop: asked before each batch.

        Raises:
          Interrupted: `stop()` returned True.
        """

        def check() -> None:
            if stop():
                raise Interrupted

        def read(rows: Sequence[int]) -> np.ndarray:
            check()
            return features(rows)

        loss, accuracy = cross_entropy(self._eval_step, params, self._plan, self._feed, check)
        batch_size = self._config.decode.batch_size
        features, frozen = self._reader(params), self._generator.freeze(params)
        found = captions_of(self._generator, frozen, self._vocabulary, self._rows, read, batch_size)
        return {"loss": loss, "accuracy": accuracy, "cider": float(self._scorer.cider(found.texts).mean())}

    def _reader(self, params: Params) -> Read:
        """Returns a function that reads, or computes, the features of rows."""
        encode = self._encode
        if encode is None:
            return self._source.read
        params = jax.tree.map(_here, params)
        return lambda rows: np.asarray(encode(params, self._frozen, self._source.read(rows), None))
