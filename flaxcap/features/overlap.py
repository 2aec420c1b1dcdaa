"""Finds images that several splits share."""

import posixpath
from collections.abc import Mapping, Sequence

from flaxcap.errors import quoted
from flaxcap.features.shards import Row

MIN_WORDS = 6  # of an image's captions: shorter ones are often equal by chance
MIN_CAPTIONS = 4  # different ones of a split whose captions equal another's


def lines(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Returns a line for each split that repeats images or captions of one before it.

    An image is repeated if another split has its file name, or the last part of its name with the same captions.

    Args:
      rows: of each split, by role.
    """
    roles, found = list(rows), []
    for number, role in enumerate(roles):
        for earlier in roles[:number]:
            if line := _line(role, rows[role], earlier, rows[earlier]):
                found.append(line)
                break
    return found


def _line(role: str, rows: Sequence[Row], earlier: str, earlier_rows: Sequence[Row]) -> str:
    known = {key for row in earlier_rows for key in _keys(row)}
    shared = [row.filename for row in rows if not known.isdisjoint(_keys(row))]
    remedy = "its scores do not tell how new images are captioned"
    if shared:
        count = f"{len(shared)} of its {len(rows)} images are in {earlier} too"
        return f"{role}: {count}; the first is {quoted(shared[0])}; {remedy}"
    captions = [sorted(row.captions for row in some) for some in (rows, earlier_rows)]
    if captions[0] == captions[1] and len(set(captions[0])) >= MIN_CAPTIONS:
        return f"{role}: its captions are those of {earlier}; {remedy}"
    return ""


def _keys(row: Row) -> list[tuple]:
    words = sum(len(caption.split()) for caption in row.captions)
    named = [(posixpath.basename(row.filename), row.captions)] if words >= MIN_WORDS else []
    return [(row.filename,), *named]
