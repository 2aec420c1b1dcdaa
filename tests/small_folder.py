"""Folders of tiny images, and what the data set `folder` makes of them."""

import io
import json
import pathlib

from PIL import Image

from flaxcap.data import datasets
from flaxcap.data.base import Example, Examples


def write_images(folder: pathlib.Path, *names: str) -> None:
    """Writes an image of its own for each name."""
    for name in names:
        out = io.BytesIO()
        Image.new("RGB", (8, 6), tuple(name.encode()[:3].ljust(3, b"0"))).save(out, "PNG")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(out.getvalue() + name.encode())


def write(file: pathlib.Path, content: object) -> None:
    """Writes text, or a tree as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def coco(names: list[str], first_id: int = 1, **fields) -> dict:
    """Returns COCO annotations with a caption of each image: "caption of" and the image's stem."""
    ids = {name: number for number, name in enumerate(names, first_id)}
    return {
        "images": [{"id": number, "file_name": name, **fields} for name, number in ids.items()],
        "annotations": [
            {"id": number, "image_id": number, "caption": f"caption of {pathlib.Path(name).stem}"}
            for name, number in ids.items()
        ],
    }


def examples(folder: pathlib.Path, dataset: str = "folder", **options) -> dict[str, list[Example]]:
    """Prepares a folder, and returns the examples of each split."""
    builder = datasets.prepare(dataset, folder.parent / f"{folder.name}-data", manual_dir=folder, **options)
    return {split: list(Examples(builder, split)) for split in builder.info.splits}


def captions(folder: pathlib.Path, dataset: str = "folder", **options) -> dict[str, dict[str, tuple[str, ...]]]:
    """Prepares a folder, and returns {split: {file name: captions}}. Each image must be the one of its name."""
    found = examples(folder, dataset, **options)
    for example in (example for some in found.values() for example in some):
        assert example.image.endswith(pathlib.PurePath(example.filename).name.encode())
    return {split: {example.filename: example.captions for example in some} for split, some in found.items()}


def all_captions(folder: pathlib.Path, dataset: str = "folder", **options) -> dict[str, tuple[str, ...]]:
    """Prepares a folder, and returns {file name: captions} of all splits."""
    return {name: texts for some in captions(folder, dataset, **options).values() for name, texts in some.items()}
