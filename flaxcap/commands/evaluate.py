"""`flaxcap evaluate`: captions a split with a model, or reads captions from a file, and scores them."""

import json
import os
import types
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath

from flaxcap.commands import from_flags
from flaxcap.config import Config
from flaxcap.data import datasets
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.features.shards import Row, Split
from flaxcap.files import integrity
from flaxcap.inference import coco_results
from flaxcap.inference.captioner import Captioner
from flaxcap.metrics import units
from flaxcap.metrics.split_scores import score_split
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import SPECIAL, Vocabulary
from flaxcap.training import step as step_lib
from flaxcap.training import validation

UNITS = {
    "words": "words",
    "characters": "characters, not words: most of the references' text is of scripts without spaces between words",
}


class Report(NamedTuple):
    """Scores of captions."""

    scores: dict[str, float]
    missing: dict[str, str]  # the reason for each score that could not be computed
    unit: str  # what scores count: "words", or "characters" in languages without spaces between words
    images: int  # that are scored
    split_images: int  # with those that the predictions leave out


def evaluate(
    captioner: Captioner,
    data_dir: epath.PathLike,
    split_name: str,
    out_dir: epath.PathLike,
    *,
    manual_dir: epath.PathLike | None = None,
    seed: int = 0,
) -> Report:
    """Captions a split and writes `predictions.json` (COCO's results format) and `scores.json`.

    Features come from the prepared store if the model's encoder made it. Then the scores include cross-entropy in nats
    a token, perplexity and teacher-forced accuracy over all reference captions. Otherwise the images of the data set
    are encoded; the captions are the same.

    Args:
      captioner: of the model, or an ensemble.
      data_dir: where the data set and prepared features are.
      split_name: "train", "val" or "test".
      out_dir: where both files are written.
      manual_dir: the user's files of the data set.
      seed: of sampling.

    Returns:
      The scores.

    Raises:
      DataError: the preset names no such split, or the data set cannot be read.
      StoreError: the prepared features are incomplete or damaged.
      UserError: the features were imported, and there is no store of them.
    """
    config = captioner.config
    found: dict[str, float] = {}
    prepared = _prepared(captioner, data_dir)
    if prepared is not None:
        split = prepared.split(split_name)
        if not captioner.others:
            found = _likelihood(captioner, split)
        present = split.present()
        rows = [split.rows[row] for row in present]
        texts, log_probs = validation.captions_of(
            captioner.generator,
            captioner.frozen,
            captioner.vocabulary,
            present,
            split.read,
            config.decode.batch_size,
            seed,
        )
    else:
        builder = datasets.prepare_for(config, data_dir, manual_dir=manual_dir)
        rows, texts, log_probs = _caption_images(captioner, builder, split_name, seed)
    found["log_prob"] = float(np.mean(log_probs))
    return _report(config, split_name, rows, texts, captioner.vocabulary, out_dir, found)


def evaluate_file(
    predictions: epath.PathLike,
    config: Config,
    data_dir: epath.PathLike,
    split_name: str,
    out_dir: epath.PathLike,
    *,
    manual_dir: epath.PathLike | None = None,
    subset: bool = False,
) -> Report:
    """Scores a file of captions against a split of the preset's data set, without a model.

    CIDEr's document frequencies are those of the references of the scored images, as in pycocoevalcap: the CIDEr of a
    subset is not the mean of its images' values in a score of the complete split.

    Args:
      predictions: a file in COCO's results format.
      config: the preset.
      data_dir: where the data set and prepared features are.
      split_name: "train", "val" or "test".
      out_dir: where `predictions.json` and `scores.json` are written.
      manual_dir: the user's files of the data set.
      subset: scores only the images that the file names.

    Returns:
      The scores.

    Raises:
      PredictionsError: the file is damaged, or does not hold one caption for each image.
      DataError: the preset names no such split, or the data set cannot be read.
    """
    path = store.path_for(data_dir, store.resolve(data_dir, config))
    if (path / "manifest.json").exists():
        prepared = store.Store(path)
        rows = prepared.split(split_name).rows
        vocabulary = prepared.vocabulary()
    else:
        builder = datasets.prepare_for(config, data_dir, manual_dir=manual_dir)
        rows = _rows(builder, config, split_name)
        vocabulary = _vocabulary_of(rows)
    named, texts = coco_results.read(predictions, rows, subset=subset)
    return _report(config, split_name, named, texts, vocabulary, out_dir, {}, len(rows))


def _report(
    config: Config,
    split_name: str,
    rows: Sequence[Row],
    texts: Sequence[str],
    vocabulary: Vocabulary,
    out_dir: epath.PathLike,
    found: dict[str, float],
    split_images: int = 0,
) -> Report:
    """Scores captions, writes captions and scores, and returns the report.

    Args:
      config: the preset.
      split_name: "train", "val" or "test".
      rows: the scored images.
      texts: their captions.
      vocabulary: the words that the captions may contain.
      out_dir: receives both files.
      found: scores known already.
      split_images: images of the split; 0: as many as are scored.
    """
    split_images = split_images or len(rows)
    more, missing, unit = score_split(rows, texts, vocabulary, datasets.caption_truth(config))
    found |= more
    out_dir = epath.Path(out_dir)
    integrity.write_atomically(out_dir / "predictions.json", coco_results.to_json(rows, texts))
    described = {
        "dataset": config.dataset,
        "split": split_name,
        "images": len(rows),
        "split_images": split_images,
        "unit": unit,
        "scores": found,
        "missing": missing,
    }
    integrity.write_atomically(out_dir / "scores.json", json.dumps(described, indent=2) + "\n")
    return Report(found, missing, unit, len(rows), split_images)


def _vocabulary_of(rows: Sequence[Row]) -> Vocabulary:
    """Returns a vocabulary of all references, for captions of a program whose own is not known."""
    unit = units.unit_of([row.captions for row in rows])
    tokens = {token for row in rows for text in row.captions for token in unit.split(text)}
    return Vocabulary([*SPECIAL, *sorted(tokens)], unit.name)


def _prepared(captioner: Captioner, data_dir: epath.PathLike) -> store.Store | None:
    """Returns the preset's prepared store if the captioner's encoder made its features, else None.

    Raises:
      UserError: the captioner was trained on imported features, and the store holds none or others.
    """
    path = store.path_for(data_dir, captioner.config)
    if (path / store.MANIFEST).exists():
        prepared = store.Store.finished(data_dir, captioner.config)
        if prepared.manifest["encoder"]["weights_sha256"] == captioner.about["encoder_sha256"]:
            return prepared
    if captioner.encoder_params is None:
        raise UserError(
            f"{path}: found no features, or others; expected those that the model was trained on"
            f" ({captioner.about['imported_from']}); `flaxcap prepare --npy_dir=DIR` imports them"
        )
    return None


def _likelihood(captioner: Captioner, split: Split) -> dict[str, float]:
    config, mesh = captioner.config, sharding.make_mesh()
    plan, feed = validation.make_feed(config, split, captioner.vocabulary, mesh)
    eval_step = step_lib.make_eval_step(captioner.bind, mesh, config.train)
    params = jax.device_put(captioner.params, sharding.replicated(mesh))
    loss, accuracy = validation.cross_entropy(eval_step, params, plan, feed)
    return {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": accuracy}


def _rows(builder: tfds.core.DatasetBuilder, config: Config, split_name: str) -> list[Row]:
    examples = datasets.examples_of(config, builder, split_name)
    return [Row(example.image_id, example.filename, example.captions) for example in examples]


def _caption_images(
    captioner: Captioner, builder: tfds.core.DatasetBuilder, split_name: str, seed: int
) -> tuple[list[Row], list[str], list[float]]:
    """Returns the readable images of a split, their captions, and the captions' log-probabilities."""
    examples = datasets.examples_of(captioner.config, builder, split_name)
    rows, texts, log_probs = [], [], []
    stream = captioner.stream((lambda n=n: examples[n].image for n in range(len(examples))), seed=seed)
    for number, found in enumerate(tqdm.tqdm(stream, "caption", len(examples), unit=" images", disable=None)):
        example = examples[number]
        if found.caption is None:
            logging.warning("%s: skipped: %s", example.filename, found.reason)
            continue
        rows.append(Row(example.image_id, example.filename, example.captions))
        texts.append(found.caption.text)
        log_probs.append(found.caption.log_prob)
    return rows, texts, log_probs


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap evaluate` and returns its exit status."""
    source = flags.data_dir, flags.split
    if flags.subset and not flags.predictions:
        raise UserError("--subset scores a part of a split: give it with --predictions=FILE")
    if flags.predictions:
        if flags.workdir or flags.model:
            raise UserError("--predictions holds a model's captions: give it without --workdir and --model")
        out_dir = flags.out_dir or os.path.join("evaluation", flags.split)
        report = evaluate_file(
            flags.predictions, config, *source, out_dir, manual_dir=flags.manual_dir, subset=flags.subset
        )
    else:
        out_dir = flags.out_dir or os.path.join(flags.workdir[0] if flags.workdir else "evaluation", flags.split)
        captioner = from_flags.captioner(flags, config)
        report = evaluate(captioner, *source, out_dir, manual_dir=flags.manual_dir, seed=flags.seed)
    width = max(map(len, report.scores))
    for name, value in report.scores.items():
        print(f"{name:{width}}  {value:.4f}")
    for name, reason in report.missing.items():
        print(f"{name:{width}}  none: {reason}")
    print(f"scores count {UNITS[report.unit]}")
    if flags.subset:
        print(f"{report.images} of {report.split_images} images")
    print(f"{out_dir}/predictions.json, {out_dir}/scores.json")
    return 0
