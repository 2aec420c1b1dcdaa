"""`flaxcap caption`: words for any picture, and a drawing of where the model looked."""

import itertools
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from flaxcap import data
from flaxcap.commands import FAILED, from_flags
from flaxcap.config import Config
from flaxcap.decoding import generate
from flaxcap.errors import UserError, plain
from flaxcap.features import extract
from flaxcap.images import decode as decode_lib
from flaxcap.images import fetch
from flaxcap.inference import captioner as captioner_lib
from flaxcap.inference import plots


class Captioned(NamedTuple):
    """A picture's caption, or why it has none."""

    name: str
    caption: str = ""
    log_prob: float = 0.0  # nats, <end> included
    plot: str = ""  # path of the attention picture
    reason: str = ""  # of a picture that cannot be captioned


def caption(
    captioner: captioner_lib.Captioner,
    pictures: Iterable[tuple[str, Callable[[], bytes]]],
    *,
    plot_dir: epath.PathLike | None = None,
    seed: int = 0,
) -> Iterator[Captioned]:
    """Captions pictures, given as names and functions that get their bytes, in their order, a batch at a time.

    With `plot_dir`, an attention picture of each is written there. A picture that cannot be read gets a reason.
    """
    config = captioner.config
    encode = extract.make_encode(captioner.encoder, config.encoder, many=False)
    run = generate.make_decode(captioner.binds, config.decode)
    folded = run.fold(*captioner.all_params)
    keys = (jax.random.fold_in(jax.random.key(seed), n) for n in itertools.count())
    pictures = iter(pictures)
    numbers = itertools.count()
    batch_size = extract.batch_size(config.encoder)
    while group := list(itertools.islice(pictures, batch_size)):
        loaded = [_load(get, config.encoder.image_size, plot_dir is not None) for _, get in group]
        good = [picture.pixels for picture in loaded if not isinstance(picture, str)]
        found = None
        if good:
            # One shape for a full batch and one for a single picture: two compilations at most.
            size = 1 if len(group) == 1 else batch_size
            feats_IPF = encode(np.stack(good + good[-1:] * (size - len(good))))
            found = jax.device_get(run(folded, jax.device_put(feats_IPF, jax.local_devices()[0]), next(keys)))
        place = 0
        for (name, _), picture in zip(group, loaded, strict=True):
            number = next(numbers)
            if isinstance(picture, str) or found is None:
                yield Captioned(name, reason=str(picture))
                continue
            text = captioner.vocabulary.decode(found.tokens_IT[place])
            plot = ""
            if plot_dir is not None and picture.shown is not None:
                path = pathlib.Path(plot_dir) / f"{number:04d}-{_stem(name)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                plots.attention_plot(Image.fromarray(picture.shown), text.split(), found.alpha_ITP[place], path)
                plot = str(path)
            yield Captioned(name, text, float(found.log_prob_I[place]), plot)
            place += 1


def from_sources(sources: list[str], *, private_urls: bool = False) -> list[tuple[str, Callable[[], bytes]]]:
    """Pictures of paths, directories and addresses; `private_urls`: also of those that are not public."""
    return [(name, lambda name=name: fetch.read(name, private=private_urls)) for name in fetch.names(sources)]


def from_split(
    captioner: captioner_lib.Captioner, data_dir: epath.PathLike, role: str, count: int
) -> list[tuple[str, Callable[[], bytes]]]:
    """The first `count` pictures of a split ("train", "val" or "test") of the data set the model was trained on."""
    config = captioner.config
    splits = data.roles(config)
    if role not in splits:
        raise data.DataError(f"--split={role}: expected one of {', '.join(splits)}")
    examples = data.read(data.of_preset(config, data_dir), splits[role])
    some = [examples[n] for n in range(min(count, len(examples)))]
    return [(e.filename, lambda e=e: e.image) for e in some]


class _Picture(NamedTuple):
    pixels: np.ndarray  # as the encoder takes it
    shown: np.ndarray | None  # in its own aspect, for the drawing


def _load(get: Callable[[], bytes], size: int, show: bool) -> _Picture | str:
    """A picture, or why it cannot be had."""
    try:
        found = get()
        return _Picture(decode_lib.decode(found, size), decode_lib.upright(found) if show else None)
    except (decode_lib.ImageError, fetch.FetchError) as e:
        return str(e)  # the exception itself would hold on to half-decoded pixels


def _stem(name: str) -> str:
    stem = pathlib.PurePosixPath(name.split("?", 1)[0]).stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:60] or "picture"


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap caption` and returns its exit status."""
    if bool(positional) == bool(flags.split):
        raise UserError("name images to caption (files, directories, addresses), or a --split")
    captioner = from_flags.captioner(flags, config)
    if positional:
        images = from_sources(positional, private_urls=flags.allow_private_urls)
    else:
        images = from_split(captioner, flags.data_dir, flags.split, flags.num_images)
    failed = 0
    for found in caption(captioner, images, plot_dir=flags.out_dir if flags.plot else None, seed=flags.seed):
        if found.reason:
            failed += 1
            reason = found.reason.removeprefix(f"{found.name}: ")
            print(f"{plain(found.name)}: {plain(reason)}", file=sys.stderr)
            continue
        print(f"{plain(found.name)}: {plain(found.caption)}  (log-probability {found.log_prob:.2f})")
        if found.plot:
            print(f"  {found.plot}")
    return FAILED if failed else 0
