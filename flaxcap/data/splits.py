"""Names of splits, and splits of a data set that has none."""

import hashlib
import re

# The usual spellings, in lower case. Other names stay as they are.
_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst"),
    "restval": ("restval",),
}
_NAMES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def normalised(name: str) -> str:
    """Returns train, val, test or restval for a usual spelling, and any other name as it is."""
    return _NAMES.get(name.strip().lower(), name)


def is_usual(name: str) -> bool:
    """Tells whether a name is a usual spelling of train, val, test or restval."""
    return name.lower() in _NAMES


def is_possible(name: str) -> bool:
    """Tells whether TFDS takes a name as that of a split. "all" has a meaning of its own there."""
    return bool(_SPLIT_NAME.fullmatch(name)) and name != "all"


def of_words(text: str) -> tuple[str, str] | None:
    """Finds the split in a file or folder's name: ("train2014", "captions_") in captions_train2014.

    Returns:
      The word with its digits, and the rest of the name. None if there is no such word, or more than one.
    """
    found = [match for match in re.finditer(r"([A-Za-z]+)\d*", text) if is_usual(match[1])]
    if len(found) != 1:
        return None
    start, end = found[0].span(1)
    return found[0][0], text[:start] + text[end:]


def split_by_name(names: list[str]) -> dict[str, list[str]]:
    """Splits names by their SHA-256: about 90% train, 5% val, 5% test, each in the given order.

    A name keeps its split when other names are added or removed, with one exception: train is never empty, and
    val is not if there are two names. Without a hash in its range, val gets the name with the highest hash, and
    train the name with the lowest.
    """
    rank = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    split_of = {name: "train" if r < 0.9 else "val" if r < 0.95 else "test" for name, r in rank.items()}
    if len(names) >= 2 and "val" not in split_of.values():
        split_of[max(names, key=rank.__getitem__)] = "val"
    if "train" not in split_of.values():
        split_of[min(names, key=rank.__getitem__)] = "train"
    return {split: [name for name in names if split_of[name] == split] for split in ("train", "val", "test")}
