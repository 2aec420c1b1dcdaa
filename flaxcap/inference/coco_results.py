"""What captions are worth: the field's scores of a split's captions, and what is wrong with them. Whoever made them."""

import json
from collections.abc import Callable, Collection, Sequence

import numpy as np
from etils import epath

from flaxcap.errors import UserError, quoted
from flaxcap.features.shards import Row
from flaxcap.files import size_limits
from flaxcap.metrics import diagnostics, meteor_spice
from flaxcap.metrics import scorer as scorer_lib

IsTrue = Callable[[int, str], bool]


class PredictionsError(UserError):
    """A file of captions that cannot be scored."""


def score(
    rows: Sequence[Row], texts: Sequence[str], vocabulary: Collection[str], is_true: IsTrue | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of one caption for each image, and for those that could not be had the reason.

    Bleu_1 … 4, ROUGE_L and CIDEr as the COCO evaluation names them, METEOR and SPICE where Java is; `health/…`, see
    `metrics.health`; CIDEr_swapped, of each image's caption given to another image, which tells what captions are
    worth that do not look; `true` and `true_swapped`, where `is_true` knows what is.
    """
    references = [row.captions for row in rows]
    scorer = scorer_lib.Scorer(references)
    found = scorer.score(texts)
    more, missing = meteor_spice.score(texts, references)
    # Each image takes the caption of the one half the split away: not its own, and nothing left to chance.
    half = len(texts) // 2
    swapped = [*texts[half:], *texts[:half]]
    found |= more | {"CIDEr_swapped": float(scorer.cider(swapped).mean())}
    if is_true is not None:
        for name, some in (("true", texts), ("true_swapped", swapped)):
            found[name] = float(np.mean([is_true(row.image_id, text) for row, text in zip(rows, some, strict=True)]))
    report = diagnostics.health(texts, references, vocabulary)
    return found | {f"health/{name}": value for name, value in report.items()}, missing


def to_json(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """COCO's results format: `[{"image_id": …, "caption": …}, …]`."""
    results = [{"image_id": row.image_id, "caption": text} for row, text in zip(rows, texts, strict=True)]
    return json.dumps(results, indent=1, ensure_ascii=False) + "\n"


def read(path: epath.PathLike, rows: Sequence[Row]) -> list[str]:
    """The captions of a file in COCO's results format, in the order of `rows`.

    PredictionsError, naming the file and the record, unless it has one caption, a string, for each image of `rows`.
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
            raise PredictionsError(f"{where}: image_id {image_id} is not in the split")
        if image_id in captions:
            raise PredictionsError(f"{where}: image_id {image_id} has a caption already; expected one for each image")
        captions[image_id] = caption
    lacking = [row.image_id for row in rows if row.image_id not in captions]
    if lacking:
        raise PredictionsError(
            f"{path}: no caption for {len(lacking)} of the split's {len(rows)} images, the first is {lacking[0]}"
        )
    return [captions[row.image_id] for row in rows]
