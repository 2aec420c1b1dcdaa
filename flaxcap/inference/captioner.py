"""A loaded captioner: images in, captions out."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxcap.config import Config
from flaxcap.decoding.generate import Generator
from flaxcap.encoders.base import ImageEncoder
from flaxcap.encoders.base import Params as EncoderParams
from flaxcap.errors import UserError
from flaxcap.features import extract
from flaxcap.features.npy_maps import FeatureShape
from flaxcap.images import decode, fetch
from flaxcap.images.decode import ImageError
from flaxcap.models.decoder import Bind, Params
from flaxcap.text.vocabulary import Vocabulary

Source = str | os.PathLike | bytes | Image.Image | np.ndarray


class Caption(NamedTuple):
    """A caption of an image."""

    text: str
    words: tuple[str, ...]  # tokens: words, characters, or pieces of which "▁" marks the first of a word
    log_prob: float  # nats, <end> included
    attention: np.ndarray  # float32 [words, P]: attention weights of each word over the positions


class Captioned(NamedTuple):
    """An image that was read, with its caption; or the reason why it has none."""

    image: bytes | Image.Image | np.ndarray | None
    caption: Caption | None
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Captioner:
    """A decoder or an ensemble, with its vocabulary and image encoder. `flaxcap.load` returns one.

    Programs are compiled at first use. A second call with the same shapes compiles nothing. `dataclasses.replace` gives
    a captioner with other decoding fields.
    """

    config: Config
    vocabulary: Vocabulary
    bind: Bind
    params: Params
    encoder: ImageEncoder
    encoder_params: EncoderParams | None  # None: the features were imported
    about: dict  # where the captioner comes from, and checksums
    others: tuple["Captioner", ...] = ()  # the other members of an ensemble

    @property
    def batch_size(self) -> int:
        """The number of images that are captioned together."""
        return extract.batch_size(self.config.encoder)

    @functools.cached_property
    def generator(self) -> Generator:
        """The decoding programs of the preset's method."""
        return Generator([self.bind, *(other.bind for other in self.others)], self.config.decode, self.vocabulary)

    @functools.cached_property
    def frozen(self) -> tuple:
        """The parameters, prepared for `generator`."""
        return self.generator.freeze(self.params, *(other.params for other in self.others))

    @functools.cached_property
    def _encode(self) -> extract.Encode:
        if self.encoder_params is None:
            raise UserError(
                f"the model was trained on {self.feature_shape.text} an image, imported from"
                f" {self.about['imported_from']}; found an image, expected its features: give --npy_dir=DIR with a map"
                " of each image, or call `caption_features`"
            )
        return extract.make_encode(self.encoder, self.encoder_params, self.config.encoder, many=False)

    @property
    def feature_shape(self) -> FeatureShape:
        """The shape of an image's features, [P, F]."""
        return FeatureShape(*(self.about[name] for name in FeatureShape._fields))

    @overload
    def caption(self, images: Source, *, seed: int = 0) -> Caption: ...

    @overload
    def caption(self, images: Iterable[Source], *, seed: int = 0) -> list[Caption]: ...

    def caption(self, images: Source | Iterable[Source], *, seed: int = 0) -> Caption | list[Caption]:
        """Captions an image, or several.

        Args:
          images: an image, or an iterable of images. An image is a path, an http(s) address, the bytes of a file, a PIL
            image, or a uint8 array [Y, X, 3], [Y, X, 4] or [Y, X].
          seed: of sampling.

        Returns:
          A `Caption` for one image, else a list of them.

        Raises:
          UserError: an image cannot be read. The message names it.
        """
        one = isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray)
        sources: list[Any] = [images] if one else list(images)  # pyright: ignore[reportArgumentType]
        found = []
        for source, captioned in zip(sources, self.stream(sources, seed=seed), strict=True):
            if captioned.caption is None:
                name = f"{source}: " if isinstance(source, str | os.PathLike) else f"image {len(found)}: "
                raise UserError(name + captioned.reason.removeprefix(name))
            found.append(captioned.caption)
        return found[0] if one else found

    def stream(self, images: Iterable[Source | Callable[[], bytes]], *, seed: int = 0) -> Iterator[Captioned]:
        """Yields the caption of each image in order, or the reason why it cannot be read.

        Args:
          images: as in `caption`, or functions that return the bytes of a file.
          seed: of sampling.
        """
        return self._caption_all(map(self._load, images), lambda images_IYX3: self._encode(images_IYX3), seed)

    def caption_features(self, feats_IPF: Iterable[np.ndarray], *, seed: int = 0) -> list[Caption]:
        """Captions images by their features.

        Args:
          feats_IPF: floats [I, P, F], or an iterable of [P, F]. NaN fills the positions that an image does not use.
          seed: of sampling.

        Raises:
          UserError: the features have another shape than those that the model was trained on.
        """
        expected = (self.feature_shape.positions, self.feature_shape.feature_dim)
        maps = list(feats_IPF)
        for number, feats_PF in enumerate(maps):
            if feats_PF.shape != expected:
                raise UserError(f"image {number}: found features {list(feats_PF.shape)}, expected {list(expected)}")
        found = self.stream_features(maps, seed=seed)
        return [captioned.caption for captioned in found if captioned.caption is not None]

    def stream_features(self, maps: Iterable[np.ndarray | str], *, seed: int = 0) -> Iterator[Captioned]:
        """Yields the caption of each image in order.

        Args:
          maps: floats [P, F] of each image, or the reason why there are none.
          seed: of sampling.
        """
        dtype = jnp.dtype(self.config.encoder.store_dtype)
        return self._caption_all(((None, found) for found in maps), lambda feats_IPF: feats_IPF.astype(dtype), seed)

    def _caption_all(
        self, loaded: Iterator[tuple[Any, np.ndarray | str]], encode: extract.Encode, seed: int
    ) -> Iterator[Captioned]:
        for number in itertools.count():
            group = list(itertools.islice(loaded, self.batch_size))
            if not group:
                return
            yield from self._caption_batch(group, encode, jax.random.fold_in(jax.random.key(seed), number))

    def _caption_batch(
        self, loaded: list[tuple[Any, np.ndarray | str]], encode: extract.Encode, key: jax.Array
    ) -> Iterator[Captioned]:
        good = [each for _, each in loaded if not isinstance(each, str)]
        captions: Iterator[Caption] = iter(())
        if good:
            # One shape for a full batch and one for a single image: at most two compilations.
            size = 1 if len(loaded) == 1 else self.batch_size
            feats_IPF = encode(np.stack(good + good[-1:] * (size - len(good))))
            feats_IPF = jax.device_put(feats_IPF, jax.local_devices()[0])
            decoded = jax.device_get(self.generator(self.frozen, feats_IPF, key))
            captions = iter([self._caption(*one) for one in zip(*decoded, strict=True)])
        for image, each in loaded:
            if isinstance(each, str):
                yield Captioned(None, None, each)
            else:
                yield Captioned(image, next(captions))

    def _caption(self, tokens_T: np.ndarray, log_prob: np.ndarray, alpha_TP: np.ndarray) -> Caption:
        words = tuple(self.vocabulary.tokens_of(tokens_T))
        return Caption(self.vocabulary.decode(tokens_T), words, float(log_prob), alpha_TP[: len(words)])

    def _load(self, source: Source | Callable[[], bytes]) -> tuple[Any, np.ndarray | str]:
        """Returns an image and its pixels, or the reason why there are none."""
        try:
            if callable(source):
                image: Any = source()
            elif isinstance(source, str | os.PathLike):
                image = fetch.read(os.path.expanduser(os.fspath(source)))
            else:
                image = source
            return image, decode.for_encoder(image, self.encoder.preprocess)
        except (ImageError, fetch.FetchError) as e:
            return None, str(e)  # the exception itself would keep half-decoded pixels in memory


def stem(name: str) -> str:
    """Returns a file name for what belongs to an image: letters, digits, - and _, at most 60."""
    found = pathlib.PurePosixPath(name.split("?", 1)[0]).stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in found)[:60] or "image"
