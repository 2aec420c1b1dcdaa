"""How good a captioner is on a prepared split: its loss on the true captions, and the captions it makes itself."""

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
from flaxcap.training.finetune import Stage

Read = Callable[[Sequence[int]], np.ndarray]  # rows -> features [len(rows), P, F]


class Interrupted(Exception):
    """A validation ends before it has a result."""


class Captions(NamedTuple):
    """A model's own captions of some images, in their order."""

    texts: list[str]
    log_probs: list[float]  # nats, <end> included


def make_feed(
    config: Config,
    split: Split,
    vocabulary: Vocabulary,
    mesh: Mesh,
    run: int = 1,
    source: Source | None = None,
    frozen: Any = None,
) -> tuple[Plan, Feed]:
    """The batches of a prepared split, `run` of them a dispatch, and what puts them onto the mesh.

    `source` and `frozen`: pictures in the place of the split's features, and what they are encoded with.
    """
    captions = (row.captions for row in split.rows)
    plan = Plan(
        Tokens.of(captions, vocabulary, config.data.max_length),
        batch_images=config.train.batch_images,
        captions_per_image=config.train.captions_per_image,
        num_buckets=config.train.num_buckets,
        run=run,
        seed=config.seed,
        skip={s.row for s in split.skipped()},
    )
    return plan, Feed(source or split, plan, mesh, config.train.features, frozen)


def cross_entropy(
    eval_step: Callable, params: Params, plan: Plan, feed: Feed, check: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Nats a token, and teacher-forced accuracy, over every caption of a plan, each counted once.

    `check` is called before each batch, and may raise.
    """

    def batch(n: int) -> list[Batch]:
        check()
        return [plan.in_order(n)]

    batches = map(batch, range(plan.steps_per_epoch))
    sums = jax.device_get([eval_step(params, inputs) for _, inputs in feed.ahead(batches)])
    nats, tokens, right = (math.fsum(column) for column in zip(*sums, strict=True))
    return nats / tokens, right / tokens


def captions_of(
    run: Generator,
    frozen: tuple[Frozen, ...],
    vocabulary: Vocabulary,
    rows: Sequence[int],
    read: Read,
    batch_size: int,
    seed: int = 0,
) -> Captions:
    """Captions of images, whose features `read` gives. Of several processes each makes its share, and all get all."""
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
            out = run(frozen, placed, key)
            if running is not None:  # the batch before; this one keeps the device busy meanwhile
                found.append(jax.device_get(running))
            running = out.tokens_IT, out.log_prob_I
        if running is not None:
            found.append(jax.device_get(running))
    if jax.process_count() > 1:
        found = _exchange(found, len(starts), size, run.length)
    tokens = [tokens_T for tokens_IT, _ in found for tokens_T in tokens_IT][: len(rows)]
    log_probs = [float(x) for _, log_prob_I in found for x in log_prob_I][: len(rows)]
    return Captions([vocabulary.decode(t) for t in tokens], log_probs)


def _here(x: jax.Array) -> np.ndarray:
    """An array that every process holds whole."""
    return np.asarray(x.addressable_data(0))


def _exchange(mine: list, batches: int, size: int, length: int) -> list:
    """All processes' batches in their order: batch n is of process n modulo their number."""
    processes = jax.process_count()
    most = -(-batches // processes)
    empty = np.zeros((size, length), np.int32), np.zeros(size, np.float32)
    padded = mine + [empty] * (most - len(mine))
    gathered = multihost_utils.process_allgather(jax.tree.map(lambda *x: np.stack(x), *padded))
    return [tuple(part[n % processes, n // processes] for part in gathered) for n in range(batches)]


class Validation:
    """A split, and what is measured on it again and again during a run."""

    def __init__(
        self,
        config: Config,
        split: Split,
        vocabulary: Vocabulary,
        mesh: Mesh,
        run: Generator,
        eval_step: Callable,
        stage: Stage,
    ):
        source, frozen, encode = stage.sources.get("val"), stage.frozen, stage.encode
        self._config, self._rows, self._vocabulary = config, split.present(), vocabulary
        self._run, self._eval_step = run, eval_step
        self._source, self._frozen = source or split, frozen
        self._encode = encode and jax.jit(encode, compiler_options=devices.convolving())
        self._plan, self._feed = make_feed(config, split, vocabulary, mesh, source=source, frozen=frozen)
        self._scorer = scorer.Scorer([split.rows[row].captions for row in self._rows])

    def __call__(self, params: Params, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Loss and accuracy on the true captions, and the CIDEr of the model's own.

        Interrupted soon after `stop()` has become true.
        """

        def check() -> None:
            if stop():
                raise Interrupted

        def read(rows: Sequence[int]) -> np.ndarray:
            check()
            return features(rows)

        loss, accuracy = cross_entropy(self._eval_step, params, self._plan, self._feed, check)
        batch_size = self._config.decode.batch_size
        features, frozen = self._read(params), self._run.freeze(params)
        found = captions_of(self._run, frozen, self._vocabulary, self._rows, read, batch_size)
        return {"loss": loss, "accuracy": accuracy, "cider": float(self._scorer.cider(found.texts).mean())}

    def _read(self, params: Params) -> Read:
        encode = self._encode
        if encode is None:
            return self._source.read
        params = jax.tree.map(_here, params)
        return lambda rows: np.asarray(encode(params, self._frozen, self._source.read(rows), None))
