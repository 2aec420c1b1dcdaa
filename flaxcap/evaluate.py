"""`flaxcap evaluate`: loss and free-running captions of a whole split, in the field's file formats."""

import json
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from etils import epath

from flaxcap import data, decode, export, store, train
from flaxcap import train_step as step_lib
from flaxcap.config import Config


def evaluate(
    captioner: export.Captioner,
    data_dir: epath.PathLike,
    split_name: str,
    out_dir: epath.PathLike,
    seed: int = 0,
) -> dict[str, float]:
    """Writes `predictions.json` (COCO's results format) and `scores.json` for a prepared split; the scores.

    Always: cross-entropy in nats a token, perplexity and teacher-forced accuracy over every caption, and the mean
    log-probability of the generated captions. Where the data set can judge captions: the share that is true, and
    the share that is true of another image, which tells what guessing gives.
    """
    config = captioner.config
    prepared = store.Store.finished(data_dir, config)
    split = prepared.split(split_name)
    mesh = step_lib.make_mesh()
    plan, feed = train.make_feed(config, split, captioner.vocabulary, mesh)
    eval_step = step_lib.make_eval_step(captioner.bind, mesh, config.train)
    params = jax.device_put(captioner.params, step_lib.replicated(mesh))
    loss, accuracy = train.validate(eval_step, params, plan, feed)
    scores = {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": accuracy}

    skipped = {s.row for s in split.skipped()}
    rows = [r for r in range(split.images) if r not in skipped]
    texts, log_probs = captions_of(captioner, split, rows, seed)
    scores["log_prob"] = float(np.mean(log_probs))
    ids = [split.rows[r].image_id for r in rows]
    scores |= _truth(config, ids, texts)

    out_dir = epath.Path(out_dir)
    results = [{"image_id": i, "caption": text} for i, text in zip(ids, texts, strict=True)]
    store.write_whole(out_dir / "predictions.json", json.dumps(results, indent=1) + "\n")
    described = {"dataset": config.dataset, "split": split_name, "images": len(rows), "scores": scores}
    store.write_whole(out_dir / "scores.json", json.dumps(described, indent=2) + "\n")
    return scores


def captions_of(
    captioner: export.Captioner, split: store.Split, rows: Sequence[int], seed: int = 0
) -> tuple[list[str], list[float]]:
    """The model's own captions of images of a store, and their log-probabilities."""
    mesh = step_lib.make_mesh()
    params = jax.device_put(captioner.params, step_lib.replicated(mesh))
    run = decode.make_decode(captioner.bind, captioner.config.decode)
    size = -(-captioner.config.decode.batch_size // mesh.size) * mesh.size
    texts: list[str] = []
    log_probs: list[float] = []
    for first in tqdm.tqdm(range(0, len(rows), size), "caption", unit=" batches", disable=None):
        some = list(rows[first : first + size])
        feats_IPF = split.read(some + some[-1:] * (size - len(some)))
        placed = jax.device_put(feats_IPF, step_lib.over_images(mesh))
        found = jax.device_get(run(params, placed, jax.random.fold_in(jax.random.key(seed), first)))
        texts += [captioner.vocabulary.decode(t) for t in found.tokens_IT[: len(some)]]
        log_probs += found.log_prob_I[: len(some)].tolist()
    return texts, log_probs


def _truth(config: Config, ids: list[int], texts: list[str]) -> dict[str, float]:
    judge = data.judge(config.dataset, **data.options(config))
    if judge is None:
        return {}
    # Each image takes the caption of the one half the split away: not its own, and nothing left to chance.
    half = len(texts) // 2
    swapped = texts[half:] + texts[:half]
    return {
        "true": float(np.mean([judge(i, text) for i, text in zip(ids, texts, strict=True)])),
        "true_of_another_image": float(np.mean([judge(i, text) for i, text in zip(ids, swapped, strict=True)])),
    }
