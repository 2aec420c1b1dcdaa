"""Tells COCO's JSON from Karpathy's without parsing it."""

import pathlib
import re

from flaxcap.data.records import read_bytes

_ANNOTATIONS = re.compile(rb'"annotations"\s*:')
_SENTENCES = re.compile(rb'"sentences"\s*:')  # an escaped quote in a caption is \", so no caption matches


def is_karpathys(file: pathlib.Path) -> bool:
    """Returns True for a JSON file with sentences and without annotations. Raises DataError if it cannot be read."""
    data = read_bytes(file)
    return bool(_SENTENCES.search(data)) and not _ANNOTATIONS.search(data)
