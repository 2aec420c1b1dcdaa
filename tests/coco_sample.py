"""COCO 2014 in small: a few images, in zips with the real layout, member names and JSON keys."""

import io
import json
import pathlib
import zipfile

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 210), "yellow": (230, 210, 40)}
CAPTIONS = (
    "A {thing} square on a {ground} ground.",
    "There is a {thing} square in front of {ground}",
    "a {thing} box, with {ground} all around it",
    "The picture shows a square that is {thing}. ",
    "One {thing} square lies on something {ground}.",
)


def write_coco_zips(
    directory: pathlib.Path, n_train: int = 6, n_restval: int = 2, n_val: int = 3, n_test: int = 3
) -> dict[str, list[str]]:
    """Writes train2014.zip, val2014.zip, annotations_trainval2014.zip and caption_datasets.zip.

    Images are numbered from 0 through train, restval, val and test. Image `number` has the id `id_of(number)`, the file
    `jpeg_of(number)` and the captions `captions_of(number)`.

    Args:
      directory: for the zips.
      n_train: images of the split train.
      n_restval: images of the split restval.
      n_val: images of the split val.
      n_test: images of the split test.

    Returns:
      The file names of each split.
    """
    numbers = iter(range(n_train + n_restval + n_val + n_test))
    splits: dict[str, list[str]] = {}
    annotated = {year: {"info": {}, "images": [], "annotations": []} for year in ("train2014", "val2014")}
    karpathy = []
    archives = {year: zipfile.ZipFile(directory / f"{year}.zip", "w") for year in annotated}
    for split, count in (("train", n_train), ("restval", n_restval), ("val", n_val), ("test", n_test)):
        year = "train2014" if split == "train" else "val2014"
        splits[split] = []
        for _ in range(count):
            number = next(numbers)
            image_id, name = id_of(number), f"COCO_{year}_{id_of(number):012d}.jpg"
            splits[split].append(name)
            archives[year].writestr(f"{year}/{name}", jpeg_of(number))
            annotated[year]["images"].append({"id": image_id, "file_name": name, "width": 64, "height": 48})
            sentences = []
            for k, text in enumerate(captions_of(number)):
                sentence_id = 10 * image_id + k
                annotated[year]["annotations"].append({"image_id": image_id, "id": sentence_id, "caption": text})
                sentences.append({"tokens": text.lower().split(), "raw": text, "sentid": sentence_id})
            karpathy.append(
                {
                    "filepath": year,
                    "filename": name,
                    "cocoid": image_id,
                    "split": split,
                    "sentences": sentences,
                }
            )
    for archive in archives.values():
        archive.close()
    with zipfile.ZipFile(directory / "annotations_trainval2014.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for year, tree in annotated.items():
            tree["annotations"].reverse()  # the real annotations are not in order
            archive.writestr(f"annotations/captions_{year}.json", json.dumps(tree))
    karpathy = karpathy[1::2] + karpathy[::2]  # the real file is not in the order of the splits
    with zipfile.ZipFile(directory / "caption_datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset_flickr8k.json", json.dumps({"images": [], "dataset": "flickr8k"}))
        archive.writestr("dataset_coco.json", json.dumps({"images": karpathy, "dataset": "coco"}))
    return splits


def id_of(number: int) -> int:
    return 9 + 16 * number


def captions_of(number: int) -> list[str]:
    thing, ground = _colours(number)
    return [text.format(thing=thing, ground=ground) for text in CAPTIONS]


def jpeg_of(number: int) -> bytes:
    thing, ground = _colours(number)
    image = Image.new("RGB", (64, 48), COLOURS[ground])
    left = 4 + 7 * number % 30
    ImageDraw.Draw(image).rectangle((left, 12, left + 24, 36), fill=COLOURS[thing])
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def _colours(number: int) -> tuple[str, str]:
    names = list(COLOURS)
    thing = number % len(names)
    return names[thing], names[(thing + 1 + number // len(names) % (len(names) - 1)) % len(names)]
