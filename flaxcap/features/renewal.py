"""Renewal of a split whose images have changed: the features of unchanged images are kept.

The old split is set aside as `STORE/.ROLE.old-0`. Its complete shards move to the new split where they hold the same
images. Extraction takes the other unchanged images from the shards that are left. `clean_up` deletes the rest.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath

from flaxcap.features.shards import CAPTIONS, Split

_OLD = ".{role}.old-"


def set_aside(path: epath.Path, role: str) -> None:
    """Renames the directory of a store's split, if there is one."""
    if (path / role).exists():
        number = len(_old_directories(path, role))
        (path / role).rename(path / f"{_OLD.format(role=role)}{number}")


def old_splits(path: epath.Path, role: str, shard_rows: int) -> list[Split]:
    """Returns the splits that were set aside; several if a renewal was interrupted by another.

    Args:
      path: the store's directory.
      role: "train", "val" or "test".
      shard_rows: rows of a shard.
    """
    found = []
    for directory in _old_directories(path, role):
        file = directory / CAPTIONS
        rows = file.read_text().count("\n") if file.exists() else 0
        found.append(Split(directory, rows, shard_rows))
    return found


def move_shards(old: Split, new: Split) -> None:
    """Moves the complete shards that hold the same images in both splits."""
    for number in old.finished():
        span = old.shard(number)
        same = number < new.num_shards and span == new.shard(number)
        if same and all(old.rows[row].digest == new.rows[row].digest for row in span):
            new.record_file(number).parent.mkdir(parents=True, exist_ok=True)
            if old.shard_file(number).exists():
                new.shard_file(number).parent.mkdir(parents=True, exist_ok=True)
                old.shard_file(number).rename(new.shard_file(number))
            old.record_file(number).rename(new.record_file(number))


def clean_up(path: epath.Path, role: str) -> None:
    """Deletes what was set aside."""
    for directory in _old_directories(path, role):
        directory.rmtree()


class KnownFeatures:
    """Features that complete shards hold, by the digest of the image.

    Args:
      splits: the splits of these shards.
    """

    def __init__(self, splits: Sequence[Split] = ()):
        self._places: dict[str, tuple[Split, int]] = {}
        for split in splits:
            skipped = {s.row for s in split.skipped()}
            rows = (row for number in split.finished() for row in split.shard(number) if row not in skipped)
            self._places |= {split.rows[row].digest: (split, row) for row in rows}

    def missing(self, split: Split, rows: Sequence[int]) -> list[int]:
        """Returns those of a split's rows whose features are not known."""
        return [row for row in rows if not self._places or split.rows[row].digest not in self._places]

    def fill(self, feats_NPF: np.ndarray, split: Split, span: range) -> None:
        """Writes the features that are known into those of the rows `span` of a split."""
        for row in sorted(set(span) - set(self.missing(split, span))):
            old, old_row = self._places[split.rows[row].digest]
            feats_NPF[row - span.start] = old.read([old_row])[0]


NOTHING_KNOWN = KnownFeatures()


def known_features(path: epath.Path, role: str, new: Split) -> KnownFeatures:
    """Returns what the split and those that were set aside for it hold; nothing if none was.

    Args:
      path: the store's directory.
      role: "train", "val" or "test".
      new: the split.
    """
    old = old_splits(path, role, new.shard_rows)
    return KnownFeatures([*old, new]) if old else NOTHING_KNOWN


def _old_directories(path: epath.Path, role: str) -> list[epath.Path]:
    return sorted(path.glob(f"{_OLD.format(role=role)}*"))
