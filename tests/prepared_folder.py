"""Folders of images and of feature maps, and a store with imported features."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, Data, Encoder
from flaxcap.features.store import Store

RANDOM = Encoder(weights="random", block="mixed0", image_size=160, batch_size=8, shard_images=4)
WIDTH = 3


def random_image(seed: int = 0, mode: str = "RGB", size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


PLAIN = encoded(random_image(1), "JPEG")


def write_folder(folder: pathlib.Path, splits: dict[str, dict[str, list[str]]], files: dict[str, bytes] | None = None):
    """Writes a folder data set.

    Args:
      folder: the directory.
      splits: {split: {image name: captions}}.
      files: the bytes of images by name; the others get those of a good image.
    """
    lines = []
    for split, images in splits.items():
        for name, captions in images.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((files or {}).get(name, PLAIN))
            lines.append(json.dumps({"image": name, "captions": captions, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def write_maps(folder: pathlib.Path, names, shape=lambda _: (8, 8, WIDTH)) -> pathlib.Path:
    for k, name in enumerate(names):
        file = folder / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.full(shape(k), k, np.float32))
    return folder


def imported(tmp_path, splits=None, shape=lambda _: (8, 8, WIDTH), **options) -> Store:
    """Prepares a folder data set with imported features, which is fast."""
    if splits is None:
        splits = {
            "train": {f"t{k}.jpg": [f"caption {k}{letter}" for letter in "abc"] for k in range(5)},
            "val": {f"v{k}.jpg": ["one", "two"] for k in range(3)},
            "test": {"x.jpg": ["alone"]},
        }
    folder = write_folder(tmp_path / "mine", splits)
    maps = write_maps(tmp_path / "npy", [name for names in splits.values() for name in names], shape)
    config = Config(dataset="folder", data=Data(**options))
    return prepare(config, tmp_path / "data", manual_dir=folder, npy_dir=maps)
