"""`shapes`: rendered scenes of two or three objects, whose captions can be judged true or false.

The data set that needs no download. An object has a colour, a texture, a size and a shape; some
kinds of object are held out of training, and every val and test picture shows at least one of them.
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

# The words of a relation, and of the first object seen from the second.
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


class Thing(NamedTuple):
    colour: str
    texture: str
    size: str
    shape: str
    x: float  # centre, in pixels
    y: float


def held_out(split: str) -> frozenset[tuple[str, str, str, str]]:
    """The kinds (colour, texture, size, shape) that only this split shows: 12 of 108 for val and test each."""
    kinds = list(itertools.product(COLOURS, TEXTURES, SIZES, SHAPES))
    order = np.random.default_rng(2015).permutation(len(kinds))
    start = {"train": 0, "val": 0, "test": 12}[split]
    return frozenset(kinds[i] for i in order[start : start + (0 if split == "train" else 12)])


def scene(image_id: int, seed: int = 0) -> list[Thing]:
    """The objects of a picture, a pure function of its id and the data set's seed."""
    return _scene(np.random.default_rng([seed, image_id]), SPLITS[image_id % 3])


def _scene(rng: np.random.Generator, split: str) -> list[Thing]:
    every = itertools.product(COLOURS, TEXTURES, SIZES, SHAPES)
    seen = sorted(set(every) - held_out("val") - held_out("test"))
    special = sorted(held_out(split))
    count = int(rng.integers(2, 4))
    while True:
        kinds = [seen[i] for i in rng.integers(len(seen), size=count)]
        if special:
            kinds[int(rng.integers(count))] = special[int(rng.integers(len(special)))]
        if len({colour for colour, *_ in kinds}) < count:
            continue
        radius_K = np.array([SIZES[size] for _, _, size, _ in kinds])
        low, high = radius_K.max(), CANVAS - radius_K.max()
        centres = rng.uniform(low, high, size=(64, count, 2))  # 64 tries; the first clear one is taken
        good = np.flatnonzero(_clear(centres, radius_K))
        if len(good):
            places = centres[good[0]].tolist()
            return [Thing(*kind, x=x, y=y) for kind, (x, y) in zip(kinds, places, strict=True)]


def _clear(centres_NK2: np.ndarray, radius_K: np.ndarray) -> np.ndarray:
    """bool [N]: are all pairs apart, and the relation of each one that nobody would dispute?"""
    good_N = np.ones(len(centres_NK2), bool)
    for a, b in itertools.combinations(range(len(radius_K)), 2):
        distance_N2 = np.sort(np.abs(centres_NK2[:, a] - centres_NK2[:, b]), axis=1)
        good_N &= distance_N2[:, 1] > radius_K[a] + radius_K[b] + 2
        good_N &= distance_N2[:, 1] > 1.6 * distance_N2[:, 0]
    return good_N


def relation(a: Thing, b: Thing) -> str:
    """Where `a` is, seen from `b`."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def render(things: list[Thing], rng: np.random.Generator) -> bytes:
    """The scene as JPEG bytes, on a background of blotches and grain."""
    blotches = rng.integers(70, 150, size=(5, 5, 3)).astype(np.uint8)
    ground = Image.fromarray(blotches).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, size=(CANVAS, CANVAS, 3))
    pixels = np.clip(np.asarray(ground, np.float32) + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    for thing in things:
        _draw(image, thing)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()


def _draw(image: Image.Image, thing: Thing, scale: int = 4) -> None:
    """One object, drawn `scale` times larger and shrunk: smooth edges."""
    r = SIZES[thing.size] * scale
    side = 2 * r
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if thing.shape == "ring":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        hole = r * 0.52
        pen.ellipse((r - hole, r - hole, r + hole, r + hole), fill=0)
    elif thing.shape == "bar":
        pen.rectangle((0, r * 0.6, side, r * 1.4), fill=255)
    else:
        pen.polygon([(r, 0), (side, side * 0.93), (0, side * 0.93)], fill=255)

    colour = COLOURS[thing.colour]
    dark = tuple(int(c * 0.25) for c in colour)
    fill = Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(fill)
    pitch = 9 * scale  # of stripes and dots: the same in pixels for both sizes
    if thing.texture == "striped":
        for y in range(0, side, pitch):
            pen.rectangle((0, y, side, y + pitch * 0.42), fill=dark)
    elif thing.texture == "dotted":
        dot = pitch * 0.27
        for row, y in enumerate(range(pitch // 4, side, pitch)):
            for x in range(pitch // 4 + (row % 2) * pitch // 2, side, pitch):
                pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=dark)
    size = (side // scale, side // scale)
    corner = (round(thing.x) - size[0] // 2, round(thing.y) - size[1] // 2)
    shrunk = mask.resize(size, Image.Resampling.BOX)
    image.paste(fill.resize(size, Image.Resampling.BOX), corner, shrunk)


def captions(things: list[Thing], rng: np.random.Generator) -> list[str]:
    """Five true captions, each worded in its own way, of pairs of the objects."""
    pairs = list(itertools.permutations(things, 2))
    texts = []
    for wording in _WORDINGS:
        a, b = pairs[int(rng.integers(len(pairs)))]
        where, its = _RELATIONS[relation(a, b)]
        texts.append(wording.format(first=_name(a, rng), second=_name(b, rng), where=where, its=its))
    return texts


def _name(thing: Thing, rng: np.random.Generator) -> str:
    """Colour and shape, and in two names of three the size or the texture."""
    return (
        f"{thing.colour} {thing.shape}",
        f"{thing.size} {thing.colour} {thing.shape}",
        f"{thing.colour} {thing.texture} {thing.shape}",
    )[int(rng.integers(3))]


def _forms() -> list[re.Pattern]:
    """The wordings as patterns: exactly what `captions` may say."""
    size, colour, texture, shape = ("|".join(words) for words in (SIZES, COLOURS, TEXTURES, SHAPES))
    name = rf"(?:(?:{size}) )?(?:{colour}) (?:{shape})|(?:{colour}) (?:{texture}) (?:{shape})"
    where, its = ("|".join(words) for words in zip(*_RELATIONS.values(), strict=True))
    groups = {"first": name, "second": name, "where": where, "its": its}
    groups = {group: f"(?P<{group}>{pattern})" for group, pattern in groups.items()}
    return [re.compile(wording.format(**groups)) for wording in _WORDINGS]


_FORMS = _forms()


def is_true(image_id: int, caption: str, seed: int = 0) -> bool:
    """Whether a caption is true of a picture: two objects of it, each attribute named, and their relation.

    Any sentence outside the grammar of `captions` is false.
    """
    text = caption.strip(" .").lower()
    match = next(filter(None, (form.fullmatch(text) for form in _FORMS)), None)
    if match is None:
        return False
    said = match.groupdict()
    where = next(k for k, words in _RELATIONS.items() if said.get("where", said.get("its")) in words)
    first, second = set(said["first"].split()), set(said["second"].split())
    return any(
        first <= set(a[:4]) and second <= set(b[:4]) and relation(a, b) == where
        for a, b in itertools.permutations(scene(image_id, seed), 2)
    )


class ShapesBuilder(CaptionBuilder):
    """TFDS builder of `num_train`, `num_val` and `num_test` scenes, rendered from `seed`."""

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
            things = _scene(rng, split)
            image, texts = render(things, rng), captions(things, rng)
            yield example(image, image_id, f"{split}-{number:05d}.jpg", enumerate(texts, start=5 * image_id))
