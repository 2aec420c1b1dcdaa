"""`flaxcap caption`: captions of images, and attention plots."""

import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from flaxcap.commands import FAILED, from_flags
from flaxcap.config import Config
from flaxcap.data import datasets
from flaxcap.errors import UserError, plain
from flaxcap.features.npy_maps import FeatureShape, read_filled
from flaxcap.features.shards import StoreError
from flaxcap.files.integrity import is_inside
from flaxcap.images import decode, fetch
from flaxcap.images.sources import ImageSources
from flaxcap.inference import plots
from flaxcap.inference.captioner import Caption, Captioner, stem

NamedImages = list[tuple[str, Callable[[], bytes]]]  # names, and functions that return the bytes of a file


class Line(NamedTuple):
    """An image's caption, or the reason why it has none."""

    name: str
    caption: str = ""
    log_prob: float = 0.0  # nats, <end> included
    plot: str = ""  # path of the attention plot
    reason: str = ""


def caption(
    captioner: Captioner,
    images: Iterable[tuple[str, Callable[[], bytes]]],
    *,
    npy_dir: epath.PathLike | None = None,
    plot_dir: epath.PathLike | None = None,
    seed: int = 0,
) -> Iterator[Line]:
    """Yields the captions of images, in their order, a batch at a time.

    Args:
      captioner: a loaded captioner.
      images: names, and functions that return the bytes of a file.
      npy_dir: the images' feature maps, for a captioner of imported features; None: the images are encoded.
      plot_dir: where attention plots are written; None: none are.
      seed: of sampling.
    """
    images = list(images)
    if npy_dir is None:
        stream = captioner.stream((get for _, get in images), seed=seed)
    else:
        folder, shape = epath.Path(npy_dir), captioner.feature_shape
        stream = captioner.stream_features((_map(folder, name, shape) for name, _ in images), seed=seed)
    for number, ((name, get), found) in enumerate(zip(images, stream, strict=True)):
        if found.caption is None:
            yield Line(name, reason=found.reason)
            continue
        plot = ""
        if plot_dir is not None:
            file = pathlib.Path(plot_dir) / f"{number:04d}-{stem(name)}.png"
            try:
                plot = _plot(captioner, get() if found.image is None else found.image, found.caption, file)
            except (decode.ImageError, fetch.FetchError) as e:
                yield Line(name, reason=str(e))
                continue
        yield Line(name, found.caption.text, found.caption.log_prob, plot)


def _map(folder: epath.Path, name: str, shape: FeatureShape) -> np.ndarray | str:
    """Returns the feature map of an image, by its path below `folder` or by its file name; or why there is none."""
    below = is_inside(name) and (folder / f"{name}.npy").exists()
    try:
        return read_filled(folder, name if below else os.path.basename(name), shape)
    except StoreError as e:
        return str(e)


def _plot(captioner: Captioner, image: Any, caption: Caption, file: pathlib.Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    thumbnail, encoder = Image.fromarray(decode.to_thumbnail(image)), captioner.encoder
    text, words, alpha_TP = caption.text, caption.words, caption.attention
    plots.attention_plot(thumbnail, text, words, alpha_TP, file, encoder.grid, encoder.preprocess.crop)
    return str(file)


def from_sources(names: Iterable[str], *, private_urls: bool = False) -> NamedImages:
    """Returns the images of files and addresses. `private_urls`: also of addresses that are not public."""
    return [(name, lambda name=name: fetch.read(name, private=private_urls)) for name in names]


def from_split(captioner: Captioner, data_dir: epath.PathLike, role: str, count: int) -> NamedImages:
    """Returns the first images of a split of the data set that the model was trained on.

    Args:
      captioner: of the model.
      data_dir: where the data set is.
      role: "train", "val" or "test".
      count: at most so many images.

    Raises:
      DataError: the preset names no split for the role, or the data set cannot be read.
    """
    config = captioner.config
    examples = datasets.examples_of(config, datasets.prepare_for(config, data_dir), role)
    some = [examples[n] for n in range(min(count, len(examples)))]
    return [(e.filename, lambda e=e: e.image) for e in some]


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap caption` and returns its exit status."""
    if bool(positional) == bool(flags.split):
        raise UserError("name images to caption (files, directories, addresses), or a --split")
    captioner = from_flags.captioner(flags, config)
    if flags.npy_dir and captioner.encoder_params is not None:
        raise UserError("--npy_dir: found a model that encodes images, expected one that was trained on imported maps")
    sources = ImageSources(positional, recursive=flags.recursive)
    if positional:
        images = from_sources(sources.images, private_urls=flags.allow_private_urls)
    else:
        images = from_split(captioner, flags.data_dir, flags.split, flags.num_images)
    failed = len(sources.failed)
    for name, reason in sources.failed:
        print(f"{plain(name)}: {plain(reason)}", file=sys.stderr)
    npy_dir = flags.npy_dir or (captioner.about.get("imported_from") if flags.split else None)
    plot_dir = flags.out_dir if flags.plot else None
    for found in caption(captioner, images, npy_dir=npy_dir, plot_dir=plot_dir, seed=flags.seed):
        if found.reason:
            failed += 1
            reason = found.reason.removeprefix(f"{found.name}: ")
            print(f"{plain(found.name)}: {plain(reason)}", file=sys.stderr)
            continue
        print(f"{plain(found.name)}: {plain(found.caption)}  (log-probability {found.log_prob:.2f})")
        if found.plot:
            print(f"  {found.plot}")
    for note in sources.notes():
        print(f"flaxcap caption: {plain(note)}", file=sys.stderr)
    return FAILED if failed else 0
