"""COCO's captions in a JSON file for each split: captions_train2014.json and captions_val2014.json, or the like."""

import pathlib
from collections.abc import Iterator

from flaxcap.data import splits
from flaxcap.data.layouts import coco, json_kind
from flaxcap.data.layouts.listing import Listing, join
from flaxcap.data.layouts.record import Dropped, ImageRecord, Layout, Match

IN_FOLDERS = ("captions.json", "annotations.json", "_annotations.coco.json")
# Of COCO's other annotations, which lie in the same directory.
OTHER = ("instances", "person_keypoints", "stuff", "panoptic", "image_info", "deepfashion", "lvis")


def _match(listing: Listing) -> list[Match]:
    """Matches sets of files whose names differ in the name of the split only."""
    groups: dict[str, dict[str, pathlib.Path]] = {}
    for folder in ("", "annotations"):
        for name in listing.files(folder, ".json"):
            found = splits.of_words(pathlib.PurePath(name).stem)
            if found and not name.startswith(OTHER):
                groups.setdefault(join(folder, found[1]), {})[found[0]] = listing.root / folder / name
    for sub in listing.subfolders(""):
        for file in listing.named(*IN_FOLDERS, folder=sub) if splits.is_usual(sub) else []:
            groups.setdefault(f"*/{file.name.lower()}", {})[sub] = file
    sets = [files for files in groups.values() if len(files) > 1]
    captions = [files for files in sets if all("captions" in file.name for file in files.values())]
    chosen = [tuple(files.values()) for files in captions or sets]
    return [Match(files) for files in chosen if not any(map(json_kind.is_karpathys, files))]


def _read(match: Match, listing: Listing, dropped: Dropped) -> Iterator[ImageRecord]:
    for file in match.files:
        folder = file.parent.relative_to(listing.root).as_posix()
        word, _ = splits.of_words(file.stem) or (folder, "")
        split = splits.normalised(word.rstrip("0123456789"))
        yield from coco.records(file, dropped, split, _folders(listing, word, split))


def _folders(listing: Listing, word: str, split: str) -> tuple[str, ...]:
    """Returns the existing folders of a split: train2014/, train/, and those below images/ and the like."""
    outer = ["", *(folder for folder in listing.image_folders() if "/" not in folder)]
    found = []
    for wanted in (word.lower(), split):
        found += [
            join(folder, name)
            for folder in outer
            for name in listing.subfolders(folder)
            if name.lower() == wanted or splits.normalised(name) == wanted
        ]
    return tuple(dict.fromkeys(found))


LAYOUT = Layout("COCO's captions in a file for each split", _match, _read)
