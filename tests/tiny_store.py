"""A finished store of synthetic features and captions, for tests that need no images."""

import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from flaxcap.config import Config, Data, Decode, Encoder, Model, Train
from flaxcap.features import store
from flaxcap.features.shards import ARRAY, CAPTIONS, Row, Split, write_rows
from flaxcap.files import integrity
from flaxcap.text.vocabulary import Vocabulary

WORDS = ["a", "dog", "cat", "runs", "sleeps", "on", "under", "the", "mat", "table", "red", "blue", "big", "small"]
POSITIONS, FEATURES = 64, 6


def tiny_config(**train: Any) -> Config:
    options: dict[str, Any] = {
        "batch_images": 8,
        "captions_per_image": 2,
        "epochs": 3,
        "num_buckets": 2,
        "log_every": 3,
    }
    return Config(
        dataset="folder",
        data=Data(vocab_size=50),
        encoder=Encoder(name="imported"),
        model=Model(image_dim=6, embedding_dim=5, attention_dim=7, hidden_dim=8, head_dim=9),
        train=Train(**options | {"warmup_steps": 3, "learning_rate": 1e-2} | train),
        decode=Decode(max_length=10, batch_size=8),
    )


def write_store(
    data_dir: pathlib.Path, config: Config, images: int = 40, text: Callable[[str], str] = str, val: int = 11
) -> store.Store:
    """Writes the store. The captions name a kind of image that the features show, so a model can learn it.

    Args:
      data_dir: where the store is written.
      config: names the store and its tokenizer.
      images: of the training split.
      text: returns the caption to write, of one of `WORDS`.
      val: images of the validation split.
    """
    path = store.path_for(data_dir, config)
    rng = np.random.default_rng(0)
    splits = {}
    for role, count in (("train", images), ("val", val), ("test", 7)):
        kinds = rng.integers(4, size=count)
        rows = [
            Row(i, f"{role}{i}.jpg", tuple(text(_caption(rng, k)) for _ in range(int(rng.integers(1, 5)))))
            for i, k in enumerate(kinds)
        ]
        write_rows(path / role, rows)
        split = Split(path / role, count, shard_rows=16)
        feats = rng.standard_normal((count, POSITIONS, FEATURES)) + np.eye(FEATURES)[kinds][:, None]
        split.create_array(POSITIONS, FEATURES, "bfloat16")[:].write(feats.astype(ml_dtypes.bfloat16)).result()
        for number in range(split.num_shards):
            split.mark_finished(number, [])
        splits[role] = {"split": role, "images": count}
    captions = [c for row in Split(path / "train", images, 16).rows for c in row.captions]
    vocabulary = Vocabulary.of_captions(captions, config.data.vocab_size, config.data.tokenizer)
    integrity.write_atomically(path / "vocabulary.json", vocabulary.to_json())
    files = ["vocabulary.json", *(f"{role}/{name}" for role in splits for name in (CAPTIONS, ARRAY))]
    manifest = {
        "source": "synthetic",
        "fingerprint": "",
        "splits": splits,
        "positions": POSITIONS,
        "feature_dim": FEATURES,
        "positions_vary": False,
        "shard_rows": 16,
        "encoder": {"name": "imported", "weights_sha256": "0" * 64, "imported_from": "nowhere"},
        "vocabulary": {
            "size": config.data.vocab_size,
            "tokenizer": config.data.tokenizer,
            "words": len(vocabulary),
            "sha256": vocabulary.hash,
        },
        "files": integrity.checksums_to_json({name: integrity.Checksum.of_file(path / name) for name in files}),
    }
    store.write_manifest(path, manifest)
    return store.Store(path)


def _caption(rng: np.random.Generator, kind: int) -> str:
    words = rng.choice(WORDS[4:], size=int(rng.integers(1, 6)))
    return " ".join(["a", ("dog", "cat", "dog runs", "cat sleeps")[kind], *words])
