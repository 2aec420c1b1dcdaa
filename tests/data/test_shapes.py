"""The rendered scenes, their captions, and the truth of captions."""

import io
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flaxcap import config
from flaxcap.config import Config, Data
from flaxcap.data import datasets, shapes
from flaxcap.data.base import Example, Examples
from flaxcap.images import decode

IDS = st.integers(0, 2**40)
SEEDS = st.integers(0, 2**32 - 1)
WORDS = {
    "colour": tuple(shapes.COLOURS),
    "texture": shapes.TEXTURES,
    "size": tuple(shapes.SIZES),
    "shape": shapes.SHAPES,
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def example(image_id: int, seed: int = 0) -> tuple[list[shapes.SceneObject], list[str]]:
    objects = shapes.scene(image_id, seed)
    return objects, shapes.captions(objects, np.random.default_rng([seed, image_id, 1]))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return datasets.prepare("shapes", tmp_path_factory.mktemp("shapes"), seed=5, num_train=60, num_val=20, num_test=20)


@pytest.fixture(scope="module")
def splits(builder) -> dict[str, list[Example]]:
    return {split: list(Examples(builder, split)) for split in shapes.SPLITS}


@given(IDS, SEEDS)
def test_a_scene_is_a_function_of_id_and_seed(image_id, seed):
    objects = shapes.scene(image_id, seed)
    shapes.scene(image_id + 1, seed)
    assert shapes.scene(image_id, seed) == objects
    assert shapes.scene(image_id + 3, seed) != objects
    assert shapes.scene(image_id, seed + 1) != objects


@given(IDS, SEEDS)
def test_objects_are_inside_the_image_apart_and_of_different_colours(image_id, seed):
    objects = shapes.scene(image_id, seed)
    assert len(objects) in (2, 3)
    assert len({obj.colour for obj in objects}) == len(objects)
    for obj in objects:
        radius = shapes.SIZES[obj.size]
        assert radius <= min(obj.x, obj.y)
        assert max(obj.x, obj.y) <= shapes.CANVAS - radius
    for a, b in itertools.combinations(objects, 2):
        near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
        assert far > shapes.SIZES[a.size] + shapes.SIZES[b.size]
        assert far > 1.5 * near, "the relation is ambiguous: beside or above?"
        assert shapes.relation(a, b) == OPPOSITE[shapes.relation(b, a)]


def test_relations_are_those_of_the_image():
    def at(x, y):
        return shapes.SceneObject("red", "plain", "small", "ring", x, y)

    middle = at(80, 80)
    objects = {"left": at(20, 90), "right": at(140, 70), "above": at(90, 20), "below": at(70, 140)}  # y grows downwards
    assert {name: shapes.relation(obj, middle) for name, obj in objects.items()} == {name: name for name in objects}


@given(IDS, SEEDS)
def test_captions_are_true_of_their_own_image(image_id, seed):
    _, captions = example(image_id, seed)
    assert len(set(captions)) == 5
    for caption in captions:
        assert shapes.is_true(image_id, caption, seed), caption
        assert shapes.is_true(image_id, f" {caption.capitalize()}. ", seed)


def wrong(word: str, objects: list[shapes.SceneObject]) -> list[str]:
    """Returns the words that make a caption false when they replace this one: none for most words."""
    if word in OPPOSITE:
        return [OPPOSITE[word]]
    # The objects differ in colour, so a colour that no object has is certainly wrong.
    shown = {obj.colour for obj in objects} | {word}
    return [other for known in WORDS.values() if word in known for other in known if other not in shown]


@given(IDS, SEEDS)
def test_one_false_word_makes_a_caption_false(image_id, seed):
    objects, captions = example(image_id, seed)
    for caption in captions:
        words = caption.split()
        changed = [
            " ".join([*words[:n], other, *words[n + 1 :]])
            for n, word in enumerate(words)
            for other in wrong(word, objects)
        ]
        assert len(changed) >= 2 * (3 + 2) + 1  # the colour and shape of both objects, and the relation
        assert not [text for text in changed if shapes.is_true(image_id, text, seed)]


@given(IDS)
def test_exchanged_objects_make_a_caption_false(image_id):
    a, b = shapes.scene(image_id)[:2]
    for where, words in {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
    }.items():
        caption = f"a {a.colour} {a.shape} {words} a {b.colour} {b.shape}"
        assert shapes.is_true(image_id, caption) == (shapes.relation(a, b) == where)
        caption = f"a {b.colour} {b.shape} {words} a {a.colour} {a.shape}"
        assert shapes.is_true(image_id, caption) == (shapes.relation(b, a) == where)
        assert not shapes.is_true(image_id, f"a {a.colour} {a.shape} {words} a {a.colour} {a.shape}")


def test_captions_of_another_image_are_mostly_false():
    verdicts = [
        shapes.is_true(image_id, caption) for image_id in range(1, 900, 3) for caption in example(image_id + 3)[1]
    ]
    assert 0 < np.mean(verdicts) < 0.05


TWO = next(image_id for image_id in itertools.count() if len(shapes.scene(image_id)) == 2)
# All captions of this image: 5 wordings, 2 orders, 3 names of each object.
TRUE_CAPTIONS = {c for k in range(3000) for c in shapes.captions(shapes.scene(TWO), np.random.default_rng(k))}


@st.composite
def garbled(draw):
    """Draws a true caption with words removed, repeated or moved."""
    words = draw(st.sampled_from(sorted(TRUE_CAPTIONS))).split()
    for _ in range(draw(st.integers(1, 3))):
        a, b = draw(st.integers(0, len(words) - 1)), draw(st.integers(0, len(words) - 1))
        moved = words[:a] + words[a + 1 :]
        words = draw(
            st.sampled_from([moved or words, [*words[:a], words[b], *words[a:]], [*moved[:b], words[a], *moved[b:]]])
        )
    return " ".join(words)


@given(st.text() | garbled())
def test_garbled_captions_are_false(text):
    assert len(TRUE_CAPTIONS) == 5 * 2 * 3 * 3
    assert shapes.is_true(TWO, text) == (text.strip(" .").lower() in TRUE_CAPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.split()[-1],  # "ring": no colour
        lambda name: " ".join(name.split()[:-1]),
        lambda name: f"{name} {name}",
        lambda name: f"{name.split()[0]} {name}",
        lambda name: f"nice {name}",
        lambda name: name.replace(" ", "  "),
        lambda name: f"{name}\n",
        lambda name: "",
        lambda name: name * 50_000,
    ],
)
def test_names_outside_the_grammar_are_false(change):
    a, b = shapes.scene(0)[:2]
    names = f"{a.colour} {a.shape}", f"{b.colour} {b.shape}"
    where = {"left": "to the left of", "right": "to the right of"}.get(shapes.relation(a, b), shapes.relation(a, b))
    assert shapes.is_true(0, f"a {names[0]} {where} a {names[1]}")
    assert not shapes.is_true(0, f"a {change(names[0])} {where} a {names[1]}")
    assert not shapes.is_true(0, f"a {names[0]} {where} a {change(names[1])}")


def test_held_out_kinds_are_shown_only_by_their_split(splits):
    val, test = shapes.held_out("val"), shapes.held_out("test")
    assert not shapes.held_out("train")
    assert len(val) == len(test) == 12
    assert not val & test
    kinds = {s: [{t[:4] for t in shapes.scene(e.image_id, 5)} for e in found] for s, found in splits.items()}
    assert not any(kind & (val | test) for kind in kinds["train"])
    assert all(kind & val and not kind & test for kind in kinds["val"])
    assert all(kind & test and not kind & val for kind in kinds["test"])
    for attribute in zip(*(kind for found in kinds["train"] for kind in found), strict=True):
        assert len(set(attribute)) in map(len, WORDS.values())  # training shows every attribute value


def test_training_captions_have_every_word(splits):
    known = {word for found in splits["train"] for caption in found.captions for word in caption.split()}
    assert set(itertools.chain.from_iterable(WORDS.values())) <= known
    assert {word for s in ("val", "test") for e in splits[s] for c in e.captions for word in c.split()} <= known


def test_the_data_set_holds_the_scenes(builder, splits):
    is_true, other_seed = (
        datasets.caption_truth(Config(dataset="shapes", data=Data(shapes=config.Shapes(seed=seed)))) for seed in (5, 6)
    )
    assert is_true is not None
    assert {split: len(found) for split, found in splits.items()} == {"train": 60, "val": 20, "test": 20}
    found = list(itertools.chain.from_iterable(splits.values()))
    assert len({e.image_id for e in found}) == len({e.filename for e in found}) == len({e.image for e in found}) == 100
    assert all(len(e.captions) == 5 and is_true(e.image_id, caption) for e in found for caption in e.captions)
    assert other_seed is not None
    assert np.mean([other_seed(e.image_id, caption) for e in found for caption in e.captions]) < 0.05
    assert re.search(r"seed5-60-20-20", str(builder.data_dir))


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one(splits, tmp_path):
    builder = datasets.prepare("shapes", tmp_path, seed=5, num_train=7, num_val=2, num_test=0)
    assert list(Examples(builder, "train")) == splits["train"][:7]
    assert list(Examples(builder, "val")) == splits["val"][:2]
    assert set(builder.info.splits) == {"train", "val"}


def test_images_show_their_objects(splits):
    for found in splits["test"]:
        image = Image.open(io.BytesIO(found.image))
        assert (image.format, image.size, image.mode) == ("JPEG", (shapes.CANVAS,) * 2, "RGB")
        pixels = decode.to_square(found.image, shapes.CANVAS).astype(int)
        for obj in shapes.scene(found.image_id, 5):
            square = pixels[inside(obj)]
            near = np.abs(square - np.array(shapes.COLOURS[obj.colour]).reshape(1, 1, 3)).max(-1) < 60
            assert near.mean() > 0.15, obj  # of the object's square, for every texture and shape


def inside(obj: shapes.SceneObject) -> tuple[slice, slice]:
    r, x, y = shapes.SIZES[obj.size], round(obj.x), round(obj.y)
    return slice(y - r, y + r), slice(x - r, x + r)


@pytest.mark.parametrize("image_id", range(6))
def test_an_object_is_drawn_at_its_centre_and_nowhere_else(image_id):
    def pixels(objects: list[shapes.SceneObject]) -> np.ndarray:
        return decode.to_square(shapes.render(objects, np.random.default_rng(0)), shapes.CANVAS).astype(int)

    objects = shapes.scene(image_id)
    complete = pixels(objects)
    for obj in objects:
        changed = np.abs(complete - pixels([other for other in objects if other != obj])).max(-1) > 40
        assert changed[inside(obj)].mean() > 0.25
        changed[inside(obj)] = False
        assert changed.mean() < 0.01  # JPEG blurs across the border


def test_rendering_is_deterministic():
    objects = shapes.scene(4)
    one, same, other = (shapes.render(objects, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other
