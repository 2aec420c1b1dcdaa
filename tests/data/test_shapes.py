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


def example(image_id: int, seed: int = 0) -> tuple[list[shapes.Thing], list[str]]:
    things = shapes.scene(image_id, seed)
    return things, shapes.captions(things, np.random.default_rng([seed, image_id, 1]))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return datasets.prepare("shapes", tmp_path_factory.mktemp("shapes"), seed=5, num_train=60, num_val=20, num_test=20)


@pytest.fixture(scope="module")
def splits(builder) -> dict[str, list[Example]]:
    return {split: list(Examples(builder, split)) for split in shapes.SPLITS}


@given(IDS, SEEDS)
def test_a_scene_is_a_function_of_id_and_seed(image_id, seed):
    things = shapes.scene(image_id, seed)
    shapes.scene(image_id + 1, seed)
    assert shapes.scene(image_id, seed) == things
    assert shapes.scene(image_id + 3, seed) != things
    assert shapes.scene(image_id, seed + 1) != things


@given(IDS, SEEDS)
def test_objects_are_whole_apart_and_of_different_colours(image_id, seed):
    things = shapes.scene(image_id, seed)
    assert len(things) in (2, 3)
    assert len({thing.colour for thing in things}) == len(things)
    for thing in things:
        radius = shapes.SIZES[thing.size]
        assert radius <= min(thing.x, thing.y)
        assert max(thing.x, thing.y) <= shapes.CANVAS - radius
    for a, b in itertools.combinations(things, 2):
        near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
        assert far > shapes.SIZES[a.size] + shapes.SIZES[b.size]
        assert far > 1.5 * near, "nobody can say whether it is beside or above"
        assert shapes.relation(a, b) == OPPOSITE[shapes.relation(b, a)]


def test_relations_are_those_of_the_picture():
    def at(x, y):
        return shapes.Thing("red", "plain", "small", "ring", x, y)

    middle = at(80, 80)
    places = {"left": at(20, 90), "right": at(140, 70), "above": at(90, 20), "below": at(70, 140)}  # y grows downwards
    assert {name: shapes.relation(place, middle) for name, place in places.items()} == {name: name for name in places}


@given(IDS, SEEDS)
def test_captions_are_true_of_their_own_picture(image_id, seed):
    _, captions = example(image_id, seed)
    assert len(set(captions)) == 5
    for caption in captions:
        assert shapes.is_true(image_id, caption, seed), caption
        assert shapes.is_true(image_id, f" {caption.capitalize()}. ", seed)


def wrong(word: str, things: list[shapes.Thing]) -> list[str]:
    """The words that would make a caption false in place of this one; for most words there are none."""
    if word in OPPOSITE:
        return [OPPOSITE[word]]
    # Colours tell the objects of a picture apart, so only a colour that is not in it is surely wrong.
    here = {thing.colour for thing in things} | {word}
    return [other for known in WORDS.values() if word in known for other in known if other not in here]


@given(IDS, SEEDS)
def test_one_false_word_makes_a_caption_false(image_id, seed):
    things, captions = example(image_id, seed)
    for caption in captions:
        words = caption.split()
        changed = [
            " ".join([*words[:place], other, *words[place + 1 :]])
            for place, word in enumerate(words)
            for other in wrong(word, things)
        ]
        assert len(changed) >= 2 * (3 + 2) + 1  # of each object its colour and shape, and the relation
        assert not [text for text in changed if shapes.is_true(image_id, text, seed)]


@given(IDS)
def test_objects_changed_round_make_a_caption_false(image_id):
    a, b = shapes.scene(image_id)[:2]
    for where, words in {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
    }.items():
        said = f"a {a.colour} {a.shape} {words} a {b.colour} {b.shape}"
        assert shapes.is_true(image_id, said) == (shapes.relation(a, b) == where)
        said = f"a {b.colour} {b.shape} {words} a {a.colour} {a.shape}"
        assert shapes.is_true(image_id, said) == (shapes.relation(b, a) == where)
        assert not shapes.is_true(image_id, f"a {a.colour} {a.shape} {words} a {a.colour} {a.shape}")


def test_captions_of_another_picture_are_mostly_false():
    verdicts = [
        shapes.is_true(image_id, caption) for image_id in range(1, 900, 3) for caption in example(image_id + 3)[1]
    ]
    assert 0 < np.mean(verdicts) < 0.05


TWO = next(image_id for image_id in itertools.count() if len(shapes.scene(image_id)) == 2)
# All that can be said of this picture: 5 wordings, 2 orders, 3 names of each object.
SAID = {c for k in range(3000) for c in shapes.captions(shapes.scene(TWO), np.random.default_rng(k))}


@st.composite
def garbled(draw):
    """A true caption with words left out, doubled and moved."""
    words = draw(st.sampled_from(sorted(SAID))).split()
    for _ in range(draw(st.integers(1, 3))):
        a, b = draw(st.integers(0, len(words) - 1)), draw(st.integers(0, len(words) - 1))
        moved = words[:a] + words[a + 1 :]
        words = draw(
            st.sampled_from([moved or words, [*words[:a], words[b], *words[a:]], [*moved[:b], words[a], *moved[b:]]])
        )
    return " ".join(words)


@given(st.text() | garbled())
def test_what_is_no_caption_is_false(text):
    assert len(SAID) == 5 * 2 * 3 * 3
    assert shapes.is_true(TWO, text) == (text.strip(" .").lower() in SAID)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.split()[-1],  # a ring: says too little
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
        assert len(set(attribute)) in map(len, WORDS.values())  # each word is seen in training


def test_every_attribute_is_learnt_from_training_captions(splits):
    said = {word for found in splits["train"] for caption in found.captions for word in caption.split()}
    assert set(itertools.chain.from_iterable(WORDS.values())) <= said
    assert {word for s in ("val", "test") for e in splits[s] for c in e.captions for word in c.split()} <= said


def test_the_data_set_is_the_scenes(builder, splits):
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


def test_a_smaller_data_set_begins_like_a_larger_one(splits, tmp_path):
    builder = datasets.prepare("shapes", tmp_path, seed=5, num_train=7, num_val=2, num_test=0)
    assert list(Examples(builder, "train")) == splits["train"][:7]
    assert list(Examples(builder, "val")) == splits["val"][:2]
    assert set(builder.info.splits) == {"train", "val"}


def test_pictures_show_their_objects(splits):
    for found in splits["test"]:
        image = Image.open(io.BytesIO(found.image))
        assert (image.format, image.size, image.mode) == ("JPEG", (shapes.CANVAS,) * 2, "RGB")
        pixels = decode.to_square(found.image, shapes.CANVAS).astype(int)
        for thing in shapes.scene(found.image_id, 5):
            square = pixels[inside(thing)]
            near = np.abs(square - np.array(shapes.COLOURS[thing.colour]).reshape(1, 1, 3)).max(-1) < 60
            assert near.mean() > 0.15, thing  # of the object's square, whatever its texture and shape


def inside(thing: shapes.Thing) -> tuple[slice, slice]:
    r, x, y = shapes.SIZES[thing.size], round(thing.x), round(thing.y)
    return slice(y - r, y + r), slice(x - r, x + r)


@pytest.mark.parametrize("image_id", range(6))
def test_an_object_is_where_the_scene_says_and_nowhere_else(image_id):
    def pixels(things: list[shapes.Thing]) -> np.ndarray:
        return decode.to_square(shapes.render(things, np.random.default_rng(0)), shapes.CANVAS).astype(int)

    things = shapes.scene(image_id)
    whole = pixels(things)
    for thing in things:
        changed = np.abs(whole - pixels([other for other in things if other != thing])).max(-1) > 40
        assert changed[inside(thing)].mean() > 0.25
        changed[inside(thing)] = False
        assert changed.mean() < 0.01  # JPEG blurs across the border


def test_rendering_is_deterministic():
    things = shapes.scene(4)
    one, same, other = (shapes.render(things, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other
