"""`shapes`: rendered scenes of two or three objects, with captions whose truth can be computed.

This data set needs no download. An object has a colour, a texture, a size and a shape. Some kinds of object are held
out of training, and every val and test image shows at least one of them.
"""

import io
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from flaxcap.data.base import CaptionBuilder, example

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 62),
    "blue": (40, 88, 216),
    "yellow": (240, 212, 40),
    "purple": (146, 52, 180),
    "white": (245, 245, 245),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 22, "large": 35}  # radius in pixels
SHAPES = ("ring", "bar", "triangle")
CANVAS = 160
SPLITS: tuple[str, ...] = ("train", "val", "test")

# {relation: (the words between the objects, the words after the second object)}
_RELATIONS = {
    "left": ("to the left of", "on its left"),
    "right": ("to the right of", "on its right"),
    "above": ("above", "above it"),
    "below": ("below", "below it"),
}
_WORDINGS = (
    "a {first} {where} a {second}",
    "there is a {first} {where} a {second}",
    "{where} a {second} is a {first}",
    "a {second} with a {first} {its}",
    "the {first} is {where} the {second}",
)


class SceneObject(NamedTuple):
    """An object of a scene."""

    colour: str
    texture: str
    size: str
    shape: str
    x: float  # centre, in pixels
    y: float


def held_out(split: str) -> frozenset[tuple[str, str, str, str]]:
    """Returns the kinds (colour, texture, size, shape) that only this split shows: 12 of 108 for val and for test."""
    kinds = list(itertools.product(COLOURS, TEXTURES, SIZES, SHAPES))
    order = np.random.default_rng(2015).permutation(len(kinds))
    start = {"train": 0, "val": 0, "test": 12}[split]
    return frozenset(kinds[i] for i in order[start : start + (0 if split == "train" else 12)])


def scene(image_id: int, seed: int = 0) -> list[SceneObject]:
    """Returns the objects of an image, a pure function of its id and the data set's seed."""
    return _scene(np.random.default_rng([seed, image_id]), SPLITS[image_id % 3])


def _scene(rng: np.random.Generator, split: str) -> list[SceneObject]:
    every = itertools.product(COLOURS, TEXTURES, SIZES, SHAPES)
    common = sorted(set(every) - held_out("val") - held_out("test"))
    special = sorted(held_out(split))
    count = int(rng.integers(2, 4))
    while True:
        kinds = [common[i] for i in rng.integers(len(common), size=count)]
        if special:
            kinds[int(rng.integers(count))] = special[int(rng.integers(len(special)))]
        if len({colour for colour, *_ in kinds}) < count:
            continue
        radii = np.array([SIZES[size] for _, _, size, _ in kinds])
        low, high = radii.max(), CANVAS - radii.max()
        layouts = rng.uniform(low, high, size=(64, count, 2))
        (clear,) = np.nonzero(_are_clear(layouts, radii))
        if len(clear):
            centres = layouts[clear[0]].tolist()
            return [SceneObject(*kind, x=x, y=y) for kind, (x, y) in zip(kinds, centres, strict=True)]


def _are_clear(layouts: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Returns which layouts keep all objects apart and the relation of each pair unambiguous.

    Args:
      layouts: float [layouts, objects, 2], the objects' centres in pixels.
      radii: int [objects], in pixels.

    Returns:
      bool [layouts].
    """
    clear = np.ones(len(layouts), bool)
    for a, b in itertools.combinations(range(len(radii)), 2):
        near, far = np.sort(np.abs(layouts[:, a] - layouts[:, b]), axis=1).T
        clear &= far > radii[a] + radii[b] + 2
        clear &= far > 1.6 * near
    return clear


def relation(a: SceneObject, b: SceneObject) -> str:
    """Returns the position of `a` relative to `b`: "left", "right", "above" or "below"."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def render(objects: list[SceneObject], rng: np.random.Generator) -> bytes:
    """Returns the scene as JPEG bytes, on a background of blotches and grain."""
    blotches = rng.integers(70, 150, size=(5, 5, 3)).astype(np.uint8)
    ground = Image.fromarray(blotches).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, size=(CANVAS, CANVAS, 3))
    pixels = np.clip(np.asarray(ground, np.float32) + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    for obj in objects:
        _draw(image, obj)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()


def _draw(image: Image.Image, obj: SceneObject, scale: int = 4) -> None:
    """Draws one object, `scale` times larger and then shrunk, for smooth edges."""
    r = SIZES[obj.size] * scale
    side = 2 * r
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if obj.shape == "ring":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        hole = r * 0.52
        pen.ellipse((r - hole, r - hole, r + hole, r + hole), fill=0)
    elif obj.shape == "bar":
        pen.rectangle((0, r * 0.6, side, r * 1.4), fill=255)
    else:
        pen.polygon([(r, 0), (side, side * 0.93), (0, side * 0.93)], fill=255)

    colour = COLOURS[obj.colour]
    dark = tuple(int(c * 0.25) for c in colour)
    fill = Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(fill)
    pitch = 9 * scale  # from stripe to stripe and from dot to dot, for both sizes
    if obj.texture == "striped":
        for y in range(0, side, pitch):
            pen.rectangle((0, y, side, y + pitch * 0.42), fill=dark)
    elif obj.texture == "dotted":
        dot = pitch * 0.27
        for row, y in enumerate(range(pitch // 4, side, pitch)):
            for x in range(pitch // 4 + (row % 2) * pitch // 2, side, pitch):
                pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=dark)
    size = (side // scale, side // scale)
    corner = (round(obj.x) - size[0] // 2, round(obj.y) - size[1] // 2)
    shrunk = mask.resize(size, Image.Resampling.BOX)
    image.paste(fill.resize(size, Image.Resampling.BOX), corner, shrunk)


def captions(objects: list[SceneObject], rng: np.random.Generator) -> list[str]:
    """Returns five true captions of pairs of objects, one of each wording."""
    pairs = list(itertools.permutations(objects, 2))
    texts = []
    for wording in _WORDINGS:
        a, b = pairs[int(rng.integers(len(pairs)))]
        where, its = _RELATIONS[relation(a, b)]
        texts.append(wording.format(first=_name(a, rng), second=_name(b, rng), where=where, its=its))
    return texts


def _name(obj: SceneObject, rng: np.random.Generator) -> str:
    """Returns a name: colour and shape, and in two cases of three the size or the texture."""
    return (
        f"{obj.colour} {obj.shape}",
        f"{obj.size} {obj.colour} {obj.shape}",
        f"{obj.colour} {obj.texture} {obj.shape}",
    )[int(rng.integers(3))]


def _patterns() -> list[re.Pattern]:
    """Returns the wordings as patterns, which match exactly the captions that `captions` can return."""
    size, colour, texture, shape = ("|".join(words) for words in (SIZES, COLOURS, TEXTURES, SHAPES))
    name = rf"(?:(?:{size}) )?(?:{colour}) (?:{shape})|(?:{colour}) (?:{texture}) (?:{shape})"
    where, its = ("|".join(words) for words in zip(*_RELATIONS.values(), strict=True))
    groups = {"first": name, "second": name, "where": where, "its": its}
    groups = {group: f"(?P<{group}>{pattern})" for group, pattern in groups.items()}
    return [re.compile(wording.format(**groups)) for wording in _WORDINGS]


_PATTERNS = _patterns()


def is_true(image_id: int, caption: str, seed: int = 0) -> bool:
    """Tells whether a caption is true: two objects of the image have the named attributes and the named relation.

    Args:
      image_id: of the image.
      caption: any text. A sentence that `captions` cannot return is false.
      seed: of the data set.
    """
    text = caption.strip(" .").lower()
    match = next(filter(None, (pattern.fullmatch(text) for pattern in _PATTERNS)), None)
    if match is None:
        return False
    named = match.groupdict()
    where = next(k for k, words in _RELATIONS.items() if named.get("where", named.get("its")) in words)
    first, second = set(named["first"].split()), set(named["second"].split())
    return any(
        first <= set(a[:4]) and second <= set(b[:4]) and relation(a, b) == where
        for a, b in itertools.permutations(scene(image_id, seed), 2)
    )


class ShapesBuilder(CaptionBuilder):
    """Scenes of objects, rendered from a seed.

    Args:
      seed: of all scenes.
      num_train: images of the split train.
      num_val: images of the split val; 0: no such split.
      num_test: images of the split test; 0: no such split.
      **kwargs: those of CaptionBuilder.
    """

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, seed: int = 0, num_train: int, num_val: int, num_test: int, **kwargs):
        self.seed = seed
        self.sizes = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
        variant = f"seed{seed}-{num_train}-{num_val}-{num_test}"
        super().__init__(variant=variant, **kwargs)

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS if self.sizes[split]}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for number in range(self.sizes[split]):
            image_id = 3 * number + SPLITS.index(split)
            rng = np.random.default_rng([self.seed, image_id])
            objects = _scene(rng, split)
            image, texts = render(objects, rng), captions(objects, rng)
            yield example(image, image_id, f"{split}-{number:05d}.jpg", enumerate(texts, start=5 * image_id))
