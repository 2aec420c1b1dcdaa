"""Untrusted caption files, presets, vocabularies and predictions: strategies of hypothesis, and judges.

A judge gives an example to flaxcap. It returns "" if flaxcap handled it correctly, and else the mistake.
"""

import csv
import io
import json
import pathlib
from typing import Any, NamedTuple

from hypothesis import strategies as st
from PIL import Image

from flaxcap import config as config_lib
from flaxcap import fields, presets
from flaxcap.data.base import DataError
from flaxcap.data.folder import FolderBuilder
from flaxcap.features.shards import Row
from flaxcap.inference import coco_results
from flaxcap.text import vocabulary

IMAGES = ("a.jpg", "deep/b c.png", "é.gif")
# Emoji of several characters, right-to-left text, accents without letters, long text, control characters, and what CSV
# and JSON quote.
HARD = (
    "👩🏽‍🚒 ❤️",
    "كلب يجري بسرعة",
    "רץ\u200f!",
    *("x" * 100_000, "a " * 50_000),
    *("\u0301", "\0\x1b[2J", '"a,b"\r\nc', "\u2028", "'"),
)
texts = st.text(max_size=60) | st.sampled_from(HARD)
captions = texts.filter(str.strip)
HALF = "\ud83d"  # half of a surrogate pair

numbers = st.integers() | st.integers(-(10**40), 10**40) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
NO_STRINGS = (
    st.none() | st.booleans() | numbers | st.lists(values, max_size=2) | st.dictionaries(texts, values, max_size=2)
)
NO_NUMBERS = st.none() | st.booleans() | st.floats() | texts | st.lists(values, max_size=2)
HUGE = st.integers(2**63, 10**40) | st.integers(-(10**40), -(2**63) - 1)


class File(NamedTuple):
    """A caption file."""

    name: str
    content: str
    named: tuple[str, ...] = ()  # what the error must name
    sound: dict[str, list[str]] | None = None  # of a sound file, the captions by image


def write_images(folder: pathlib.Path) -> None:
    for name in IMAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


def _file(kind: str, records: list[tuple[str, Any]]) -> str:
    """Returns a file of this kind with records (image, caption)."""
    if kind == "captions.jsonl":
        return "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in records)
    if kind == "captions.csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows([("image", "caption"), *records])
        return out.getvalue()
    return json.dumps(_coco(records))


def _coco(records: list[tuple[str, Any]]) -> dict:
    return {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(IMAGES)],
        "annotations": [
            {"id": 10 + n, "image_id": IMAGES.index(image), "caption": caption}
            for n, (image, caption) in enumerate(records)
        ],
    }


_records = st.lists(st.tuples(st.sampled_from(IMAGES), captions), min_size=1, max_size=5)
BLANK = ("", " ", "\n\t", "\u2003")  # captions that are dropped
KINDS = ("captions.csv", "captions.jsonl", "captions.json")


@st.composite
def sound_files(draw) -> File:
    records = draw(_records)
    expected: dict[str, list[str]] = {}
    for image, caption in records:
        expected.setdefault(image, []).append(caption.strip())
    kind = draw(st.sampled_from(KINDS))
    empty = draw(st.lists(st.tuples(st.sampled_from(IMAGES), st.sampled_from(BLANK)), max_size=2))
    return File(kind, _file(kind, records + empty), sound=expected)


@st.composite
def broken_lines(draw) -> File:
    """Draws JSON lines with one wrong field."""
    records = [{"image": image, "caption": caption} for image, caption in draw(_records)]
    number = draw(st.integers(0, len(records) - 1))
    record: dict[str, Any] = records[number]
    match draw(st.sampled_from(("image", "missing", "caption", "half", "captions", "split", "none", "all"))):
        case "image":
            field, record["image"] = "image", draw(NO_STRINGS)
        case "missing":
            field, record["image"] = "image", draw(texts.filter(lambda name: name not in IMAGES))
        case "caption":
            field, record["caption"] = "caption", draw(NO_STRINGS)
        case "half":
            field = draw(st.sampled_from(("image", "caption")))
            record[field] = HALF
        case "captions":
            field, record["captions"] = "captions", draw(NO_STRINGS.filter(lambda v: not isinstance(v, list)))
            del record["caption"]
        case "split":
            # A wrong type, a wrong name, or a split in one record alone.
            field, record["split"] = (
                "split",
                draw(NO_STRINGS | st.sampled_from(("", "all", "../x", "a b", "x" * 100_000))),
            )
        case "none":
            field = draw(st.sampled_from(("image", "caption")))
            del record[field]
        case _:
            field, records[number] = "", draw(values.filter(lambda v: not isinstance(v, dict)))  # pyright: ignore
    named = (f"line {number + 1}", f"'{field}'") if field else (f"line {number + 1}",)
    return File("captions.jsonl", "".join(json.dumps(record) + "\n" for record in records), named)


@st.composite
def broken_trees(draw) -> File:
    """Draws COCO's annotations with one wrong field."""
    records = draw(_records)
    tree: dict[str, Any] = _coco(records)
    number = draw(st.integers(0, len(records) - 1))
    image = draw(st.integers(0, len(IMAGES) - 1))
    annotation, listed = tree["annotations"][number], tree["images"][image]
    in_images, in_annotations = f"images[{image}]", f"annotations[{number}]"
    twice = len(records) > 1
    match draw(
        st.sampled_from(("image_id", "id", "caption", "half", "images.id", "file_name", "unknown", "twice", "same"))
    ):
        case "image_id" | "id" as field:
            annotation[field] = draw(NO_NUMBERS.filter(lambda value: value is not None) | HUGE)  # None: dropped
            named = (in_annotations, f"'{field}'")
        case "caption" as field:
            annotation[field] = draw(NO_STRINGS)
            named = (in_annotations, f"'{field}'")
        case "half":
            annotation["caption"] = HALF
            named = (in_annotations, "'caption'")
        case "images.id":
            listed["id"] = draw(NO_NUMBERS | HUGE)
            named = (in_images, "'id'")
        case "file_name" as field:
            listed[field] = draw(NO_STRINGS)
            named = (in_images, f"'{field}'")
        case "unknown":
            annotation["image_id"] = draw(st.integers(len(IMAGES), 2**63 - 1))
            named = (in_annotations, "'image_id'", str(annotation["image_id"]))
        case "twice" if twice:
            annotation["id"] = tree["annotations"][number - 1]["id"]
            named = ("annotations[", "'id'", "second time")
        case _:
            listed["id"] = tree["images"][image - 1]["id"]
            named = ("images[", "'id'", "second time")
    return File("captions.json", json.dumps(tree), named)


@st.composite
def junk_files(draw) -> File:
    """Draws any text, JSON or table. The result must be captions, or an error that names the file."""
    kind = draw(st.sampled_from(KINDS))
    tables = st.lists(st.lists(texts | st.sampled_from((*IMAGES, "image", "caption")), max_size=4), max_size=4)
    content = draw(texts | values.map(json.dumps) | tables.map(_csv))
    return File(kind, content if draw(st.booleans()) else f"image,caption\n{content}")


def _csv(rows: list[list[str]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue()


files = sound_files() | broken_lines() | broken_trees() | junk_files()


def judge_file(folder: pathlib.Path, file: File) -> str:
    """Gives a caption file to the data set `folder`. The directory holds `IMAGES`."""
    path = folder / file.name
    path.write_bytes(file.content.encode())
    try:
        builder = FolderBuilder(manual_dir=folder, data_dir=folder / "data")
        manager: Any = None  # nothing is downloaded
        splits: Any = builder._split_generators(manager)  # TFDS calls this method; it reads the file
        found = {e["image/filename"]: [c["text"] for c in e["captions"]] for made in splits.values() for _, e in made}
    except DataError as error:
        message = str(error)
        if file.sound is not None:
            return f"a sound file: {message}"
        missing = [words for words in (str(path), *file.named) if words not in message]
        if len(message) > 1000 + len(str(path)):
            return f"a message of {len(message)} characters"
        return f"{missing} not in {message}" if missing else ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        path.unlink()
    if file.named:
        return f"accepted, expected {file.named} to be named"
    return "" if file.sound is None or found == file.sound else f"found {str(found)[:200]}"


class Preset(NamedTuple):
    """A saved preset."""

    content: str
    named: str = ""  # the field that the error must name


_LEAVES = {name: field.value for name, field in fields.flatten(config_lib.Config()).items()}


@st.composite
def presets_(draw) -> Preset:
    if draw(st.integers(0, 9)) == 0:
        return Preset(draw(texts | values.map(json.dumps)))
    tree = json.loads(presets.to_json(config_lib.Config()))
    name = draw(st.sampled_from(sorted(_LEAVES)))
    *groups, field = name.split(".")
    node = tree
    for group in groups:
        node = node[group]
    value = _LEAVES[name]
    kinds = {bool: numbers | texts | st.none(), int: NO_NUMBERS | st.integers(2**32, 10**40), str: NO_STRINGS}
    wrong = kinds.get(type(value), st.none() | texts | st.lists(values) | st.just(float("nan")) | st.just(float("inf")))
    if draw(st.booleans()):
        node[field] = draw(wrong)
        return Preset(json.dumps(tree), field)
    unknown = draw(texts.filter(lambda text: text not in node))
    node[unknown] = draw(values)
    return Preset(json.dumps(tree), "unknown field")


def judge_preset(file: pathlib.Path, preset: Preset) -> str:
    """Reads a preset. An error of a value's range names the flag instead of the file."""
    file.write_bytes(preset.content.encode())
    try:
        config_lib.check(presets.load(str(file)))
    except config_lib.ConfigError as error:
        message = str(error)
        if not (message.startswith((f"{file}: ", "--config."))) or preset.named not in message or len(message) > 1000:
            return f"{preset.named!r} is not named in {message[:300]}"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return f"accepted, expected {preset.named} to be named" if preset.named else ""


vocabularies = (texts | values.map(json.dumps)) | st.lists(texts | values, max_size=4).map(
    lambda words: json.dumps({"hash": "", "tokenizer": "words", "tokens": [*vocabulary.SPECIAL, *words]})
)


def judge_vocabulary(content: str) -> str:
    """Reads a vocabulary. Each must be refused, since no drawn hash is right."""
    try:
        vocabulary.Vocabulary.from_json(content, "some/vocabulary.json")
    except vocabulary.VocabularyError as error:
        return "" if str(error).startswith("some/vocabulary.json: ") else f"not named in {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "accepted"


ROWS = [Row(3, "a.jpg", ("a dog",)), Row(7, "b.jpg", ("a cat",))]
_records_of_results = st.fixed_dictionaries(
    {}, optional={"image_id": st.sampled_from((3, 7, 8)) | values, "caption": texts | values}
)
results = texts | values.map(json.dumps) | st.lists(_records_of_results | values, max_size=3).map(json.dumps)


def judge_results(file: pathlib.Path, content: str) -> str:
    """Reads predictions."""
    file.write_bytes(content.encode())
    try:
        _, found = coco_results.read(file, ROWS)
    except coco_results.PredictionsError as error:
        return "" if str(file) in str(error) and len(str(error)) < 1000 else f"not named in {str(error)[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    wanted = {int(record["image_id"]): record["caption"] for record in json.loads(content)}
    return "" if found == [wanted[row.image_id] for row in ROWS] else f"found {found}"
