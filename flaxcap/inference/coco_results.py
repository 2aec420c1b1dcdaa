"""Files of captions in COCO's results format: [{"image_id": 1, "caption": "a dog"}, …]."""

import json
import re
from collections.abc import Sequence

from etils import epath

from flaxcap.errors import UserError, quoted
from flaxcap.features.shards import Row
from flaxcap.files import size_limits


class PredictionsError(UserError):
    """A file of captions that cannot be scored."""


def to_json(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Returns the captions of a split's images in COCO's results format."""
    results = [{"image_id": row.image_id, "caption": text} for row, text in zip(rows, texts, strict=True)]
    return json.dumps(results, indent=1, ensure_ascii=False) + "\n"


def read(path: epath.PathLike, rows: Sequence[Row], *, subset: bool = False) -> tuple[list[Row], list[str]]:
    """Reads a file in COCO's results format.

    Args:
      path: the file. An image_id is a number, or a string of digits such as "000000042".
      rows: the images of the split.
      subset: the file may name some of the images only.

    Returns:
      The images that the file names, in the order of `rows`, and a caption for each.

    Raises:
      PredictionsError: the file cannot be read, names no image, another image or one twice, or, without `subset`, not
        every image.
    """
    wanted = {row.image_id for row in rows}
    captions: dict[int, str] = {}
    for number, record in enumerate(_records(path)):
        where = f"{path}: record {number}"
        if not isinstance(record, dict) or not {"image_id", "caption"} <= set(record):
            raise PredictionsError(f"{where}: found {quoted(record)}, expected an object with image_id and caption")
        image_id, caption = _number(record["image_id"]), record["caption"]
        if image_id is None or not isinstance(caption, str):
            found = f"{quoted(record['image_id'])} and {quoted(caption)}"
            raise PredictionsError(f"{where}: found {found}, expected a number and a string")
        if image_id not in wanted:
            raise PredictionsError(f"{where}: found image_id {image_id}, expected an image of the split")
        if image_id in captions:
            raise PredictionsError(f"{where}: found a second caption for image_id {image_id}, expected one an image")
        captions[image_id] = caption
    lacking = [row.image_id for row in rows if row.image_id not in captions]
    if subset and not captions:
        raise PredictionsError(f"{path}: found no caption, expected one at least")
    if lacking and not subset:
        raise PredictionsError(
            f"{path}: found no caption for {len(lacking)} of the split's {len(rows)} images,"
            f" expected one for each; the first is image_id {lacking[0]}; --subset scores the others"
        )
    named = [row for row in rows if row.image_id in captions]
    return named, [captions[row.image_id] for row in named]


def _records(path: epath.PathLike) -> list:
    """Returns the parsed list; PredictionsError if there is none."""
    try:
        records = json.loads(size_limits.read(epath.Path(path), size_limits.CAPTIONS))
    except OSError as e:
        raise PredictionsError(f"--predictions={path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, RecursionError) as e:
        raise PredictionsError(f"{path}: not JSON ({e})") from e
    if not isinstance(records, list):
        raise PredictionsError(f"{path}: found {type(records).__name__}, expected a list of image_id and caption")
    return records


def _number(image_id: object) -> int | None:
    """Returns an id given as a number or as a string of digits, else None. COCO's file names pad it with zeros."""
    if isinstance(image_id, str) and re.fullmatch("[0-9]{1,30}", image_id):
        return int(image_id)
    return image_id if type(image_id) is int else None
