"""Files of captions in COCO's results format: [{"image_id": 1, "caption": "a dog"}, …]."""

import json
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


def read(path: epath.PathLike, rows: Sequence[Row]) -> list[str]:
    """Reads a file in COCO's results format.

    Args:
      path: the file.
      rows: the images of the split.

    Returns:
      A caption for each image, in the order of `rows`.

    Raises:
      PredictionsError: the file cannot be read, or has not exactly one caption for each image.
    """
    try:
        records = json.loads(size_limits.read(epath.Path(path), size_limits.CAPTIONS))
    except OSError as e:
        raise PredictionsError(f"--predictions={path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, RecursionError) as e:
        raise PredictionsError(f"{path}: not JSON ({e})") from e
    if not isinstance(records, list):
        raise PredictionsError(f"{path}: found {type(records).__name__}, expected a list of image_id and caption")
    wanted = {row.image_id for row in rows}
    captions: dict[int, str] = {}
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        if not isinstance(record, dict) or not {"image_id", "caption"} <= set(record):
            raise PredictionsError(f"{where}: found {quoted(record)}, expected an object with image_id and caption")
        image_id, caption = record["image_id"], record["caption"]
        if type(image_id) is not int or not isinstance(caption, str):
            found = f"{quoted(image_id)} and {quoted(caption)}"
            raise PredictionsError(f"{where}: found {found}, expected a number and a string")
        if image_id not in wanted:
            raise PredictionsError(f"{where}: found image_id {image_id}, expected an image of the split")
        if image_id in captions:
            raise PredictionsError(f"{where}: found a second caption for image_id {image_id}, expected one an image")
        captions[image_id] = caption
    lacking = [row.image_id for row in rows if row.image_id not in captions]
    if lacking:
        raise PredictionsError(
            f"{path}: found no caption for {len(lacking)} of the split's {len(rows)} images,"
            f" expected one for each; the first is image_id {lacking[0]}"
        )
    return [captions[row.image_id] for row in rows]
