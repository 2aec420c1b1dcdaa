"""`flaxcap evaluate`: free-running captions of a whole split, or anyone's captions of it, and their scores."""

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
from flaxcap.data.base import DataError, Examples
from flaxcap.errors import UserError
from flaxcap.features import store
from flaxcap.features.shards import Row, Split
from flaxcap.files import integrity
from flaxcap.inference import coco_results
from flaxcap.inference.captioner import Captioner
from flaxcap.metrics.split_scores import score_split
from flaxcap.runtime import sharding
from flaxcap.text.vocabulary import SPECIAL
from flaxcap.text.words import words
from flaxcap.training import step as step_lib
from flaxcap.training import validation


class Report(NamedTuple):
    scores: dict[str, float]
    missing: dict[str, str]  # scores that could not be had, and why


def evaluate(
    captioner: Captioner,
    data_dir: epath.PathLike,
    split_name: str,
    out_dir: epath.PathLike,
    *,
    manual_dir: epath.PathLike | None = None,
    seed: int = 0,
) -> Report:
    """Writes `predictions.json` (COCO's results format) and `scores.json` of a split's captions; the scores.

    A prepared store of the model's own features is read if there is one: then there are also the cross-entropy in nats
    a token, perplexity and teacher-forced accuracy over every true caption. Else the pictures of the data set are
    encoded as they come; the captions are the same.
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
        rows, texts, log_probs = _of_pictures(captioner, builder, split_name, seed)
    found["log_prob"] = float(np.mean(log_probs))
    return _report(config, split_name, rows, texts, captioner.vocabulary.tokens, out_dir, found)


def evaluate_file(
    predictions: epath.PathLike,
    config: Config,
    data_dir: epath.PathLike,
    split_name: str,
    out_dir: epath.PathLike,
    *,
    manual_dir: epath.PathLike | None = None,
) -> Report:
    """Scores of a file in COCO's results format against a split of the preset's data set; no model is needed."""
    path = store.path_for(data_dir, config)
    if (path / "manifest.json").exists():
        prepared = store.Store(path)
        rows = prepared.split(split_name).rows
        vocabulary: Sequence[str] = prepared.vocabulary().tokens
    else:
        builder = datasets.prepare_for(config, data_dir, manual_dir=manual_dir)
        rows = _rows(builder, config, split_name)
        vocabulary = sorted({word for row in rows for text in row.captions for word in words(text)})
    texts = coco_results.read(predictions, rows)
    return _report(config, split_name, rows, texts, vocabulary, out_dir, {})


def _report(
    config: Config,
    split_name: str,
    rows: Sequence[Row],
    texts: Sequence[str],
    vocabulary: Sequence[str],
    out_dir: epath.PathLike,
    found: dict[str, float],
) -> Report:
    """Scores, written beside the captions."""
    known = [word for word in vocabulary if word not in SPECIAL]
    more, missing = score_split(rows, texts, known, datasets.caption_truth(config))
    found |= more
    out_dir = epath.Path(out_dir)
    integrity.write_atomically(out_dir / "predictions.json", coco_results.to_json(rows, texts))
    described = {
        "dataset": config.dataset,
        "split": split_name,
        "images": len(rows),
        "scores": found,
        "missing": missing,
    }
    integrity.write_atomically(out_dir / "scores.json", json.dumps(described, indent=2) + "\n")
    return Report(found, missing)


def _prepared(captioner: Captioner, data_dir: epath.PathLike) -> store.Store | None:
    """The finished store of the preset, if its features are those of the captioner's encoder."""
    path = store.path_for(data_dir, captioner.config)
    if not (path / "manifest.json").exists():
        return None
    prepared = store.Store.finished(data_dir, captioner.config)
    made_by = prepared.manifest["encoder"]["weights_sha256"]
    return prepared if made_by == captioner.about["encoder_sha256"] else None


def _likelihood(captioner: Captioner, split: Split) -> dict[str, float]:
    config, mesh = captioner.config, sharding.make_mesh()
    plan, feed = validation.make_feed(config, split, captioner.vocabulary, mesh)
    eval_step = step_lib.make_eval_step(captioner.bind, mesh, config.train)
    params = jax.device_put(captioner.params, sharding.replicated(mesh))
    loss, accuracy = validation.cross_entropy(eval_step, params, plan, feed)
    return {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": accuracy}


def _rows(builder: tfds.core.DatasetBuilder, config: Config, split_name: str) -> list[Row]:
    examples = Examples(builder, _split(config, split_name))
    return [Row(example.image_id, example.filename, example.captions) for example in examples]


def _split(config: Config, role: str) -> str:
    splits = datasets.splits(config)
    if role not in splits:
        raise DataError(f"--split={role}: expected one of {', '.join(splits)}")
    return splits[role]


def _of_pictures(
    captioner: Captioner, builder: tfds.core.DatasetBuilder, split_name: str, seed: int
) -> tuple[list[Row], list[str], list[float]]:
    """The images of a split that can be read, their captions, and these' log-probabilities."""
    examples = Examples(builder, _split(captioner.config, split_name))
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
    if flags.predictions:
        if flags.workdir or flags.model:
            raise UserError("--predictions holds a model's captions: give it without --workdir and --model")
        out_dir = flags.out_dir or os.path.join("evaluation", flags.split)
        report = evaluate_file(flags.predictions, config, *source, out_dir, manual_dir=flags.manual_dir)
    else:
        out_dir = flags.out_dir or os.path.join(flags.workdir[0] if flags.workdir else "evaluation", flags.split)
        captioner = from_flags.captioner(flags, config)
        report = evaluate(captioner, *source, out_dir, manual_dir=flags.manual_dir, seed=flags.seed)
    width = max(map(len, report.scores))
    for name, value in report.scores.items():
        print(f"{name:{width}}  {value:.4f}")
    for name, reason in report.missing.items():
        print(f"{name:{width}}  none: {reason}")
    print(f"{out_dir}/predictions.json, {out_dir}/scores.json")
    return 0
