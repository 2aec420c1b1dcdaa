"""Captions, presets, weights, feature maps, archives and models from strangers under torture."""

import io
import json
import pathlib
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import hypothesis
import numpy as np
from etils import epath
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy
from torture_cases import images as torture_images
from torture_cases import programs as torture_programs
from torture_cases import records as torture_records

from flaxcap.encoders.inception_v3 import network
from flaxcap.files import integrity
from flaxcap.inference import export

FUZZED = 5000  # of each kind of record
BROKEN = 1000  # weights, feature maps, archives
MODELS = 200
A_PROCESS = 100  # files that one process reads
KINDS = [kind for kind in torture_images.MUTATIONS if kind not in ("sizes", "none")]
READING_MB = 1000  # that a process may take to read broken files, beside what it takes for sound ones


def fuzzed(name: str, count: int, *kinds: tuple[SearchStrategy, Callable[[Any], str]]) -> dict:
    """A case that draws `count` of each strategy, and has each judged."""
    lost: dict[str, str] = {}
    tried = 0
    for strategy, judge in kinds:

        @hypothesis.seed(0)
        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        )
        @hypothesis.given(strategy)
        def each(made):
            nonlocal tried
            tried += 1
            if wrong := judge(made):  # noqa: B023  # it is called before there is another one
                lost.setdefault(wrong, repr(made)[:500])

        each()  # pyright: ignore[reportCallIssue]
    listed = [f"{wrong}: {made}" for wrong, made in lost.items()]
    return {"case": name, "tried": tried, "survived": tried - len(lost), "lost": listed}


def captions_fuzzed(scratch: pathlib.Path, scale: float) -> dict:
    """Captions come back as they were written, or the error names file, record and field."""
    torture_records.write_images(scratch)
    made = (
        torture_records.sound_files(),
        torture_records.broken_lines(),
        torture_records.broken_trees(),
        torture_records.junk_files(),
    )
    judges = ((files, lambda file: torture_records.judge_file(scratch, file)) for files in made)
    return fuzzed("captions_fuzzed", max(1, round(FUZZED * scale)), *judges)


def presets_and_vocabularies_fuzzed(scratch: pathlib.Path, scale: float) -> dict:
    """Presets, vocabularies and predictions that are not what they should be are named."""
    return fuzzed(
        "presets_and_vocabularies_fuzzed",
        max(1, round(FUZZED * scale)),
        (torture_records.presets_(), lambda made: torture_records.judge_preset(scratch / "preset.json", made)),
        (torture_records.vocabularies, torture_records.judge_vocabulary),
        (torture_records.results, lambda made: torture_records.judge_results(scratch / "results.json", made)),
    )


READERS = {
    "weights": "from flaxcap.encoders.inception_v3 import weights\nread = lambda path: weights.read(path, 'mixed0')",
    "maps": (
        "from etils import epath\nfrom flaxcap.features import npy_maps\n"
        "read = lambda path: npy_maps.read_npy(epath.Path(path.parent), path.name.removesuffix('.npy'))"
    ),
    "archives": (
        "from flaxcap.data.coco_captions import CocoCaptionsBuilder\n"
        "def read(path):\n"
        "    builder = CocoCaptionsBuilder(manual_dir=path, data_dir=path / 'data')\n"
        "    for examples in builder._split_generators(None).values():\n"
        "        list(examples)"
    ),
    "models": "from flaxcap.inference import loading\nread = loading.load_export",
}
READ_ALL = """
import pathlib, sys
from flaxcap.errors import UserError
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    print(path.name, end=" ", flush=True)
    try:
        read(path)
        print("read")
    except UserError as e:
        print("refused" if str(path) in str(e) else f"does not name it: {e!r}"[:300])
    except Exception as e:
        print(f"{type(e).__name__}: {e}".replace(chr(10), " ")[:300])
"""


def read_all(name: str, reader: str, broken: Iterator[Callable[[pathlib.Path], object]], scratch: pathlib.Path) -> dict:
    """A case whose files, each written by a function, are read by processes; the first is sound."""
    lost, counts, memory, first = [], {"read": 0, "refused": 0}, 0.0, 0.0
    tried = 0
    while some := [write for _, write in zip(range(A_PROCESS if first else 1), broken, strict=False)]:
        folder = scratch / "broken"
        folder.mkdir()
        for number, write in enumerate(some, tried):
            write(folder / f"{number:05d}{'.npy' if reader == 'maps' else ''}")
        tried += len(some)
        ended = torture_programs.run(sys.executable, "-c", READERS[reader] + READ_ALL, folder, within_s=1800)
        shutil.rmtree(folder)
        lines = [line.partition(" ")[::2] for line in ended.out.splitlines() if line[:5].isdecimal()]
        for path, said in lines:
            if said in counts:
                counts[said] += 1
            else:
                lost.append(f"{path}: {said or 'its reader died'}")
        if ended.status:
            lost.append(f"{lines[-1][0] if lines else 'none'}: status {ended.status}: {ended.err[-300:]}")
        first = first or ended.memory
        memory = max(memory, ended.memory)
    if memory > first + READING_MB:
        lost.append(f"{memory:.0f} MB, expected at most {first + READING_MB:.0f}")
    figures = {"mb": round(memory), "sound_mb": round(first), **counts}
    return {"case": name, "tried": tried, "survived": counts["read"] + counts["refused"], "lost": lost, **figures}


def broken_copies(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The file itself, and `count` - 1 broken ones."""
    yield whole
    for number in range(1, count):
        draw = np.random.default_rng([seed, number])
        yield torture_images.MUTATIONS[KINDS[number % len(KINDS)]](whole, draw)


def write_weights(file: pathlib.Path | io.BytesIO, **options: Any) -> h5py.File:
    """InceptionV3's weights up to mixed0, kernel N all N; `options`: how HDF5 keeps the first kernel."""
    found = h5py.File(file, "w")
    for number, shape in enumerate(network.kernel_shapes("mixed0").values(), 1):
        kernel = np.full(shape, number, np.float32)
        found.create_dataset(f"conv2d_{number}/kernel:0", data=kernel, **(options if number == 1 else {}))
        for name in ("beta", "moving_mean", "moving_variance"):
            found[f"batch_normalization_{number}/{name}:0"] = np.ones(shape[-1:], np.float32)
    return found


def weights_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Weight files are read as data, or refused."""
    out = io.BytesIO()
    write_weights(out, compression="gzip").close()
    whole = out.getvalue()
    count = max(1, round(BROKEN * scale))

    def copies():
        yield whole
        # What describes the data is little of the file: two of three changes are made there.
        described = [found.start() for found in re.finditer(b"TREE|HEAP|SNOD|OHDR", whole)]
        for number in range(1, count):
            draw = np.random.default_rng([1, number])
            changed = bytearray(whole)
            near = draw.choice(described, 4) + draw.integers(0, 600, 4)
            for place in near if number % 3 else draw.integers(0, len(whole), 4):
                changed[place % len(whole)] = draw.integers(256)
            yield bytes(changed) if number % 10 else bytes(changed[: draw.integers(len(whole))])

    return read_all("weights_broken", "weights", ((lambda path, d=d: path.write_bytes(d)) for d in copies()), scratch)


def maps_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Feature maps made elsewhere are read as numbers, or refused."""
    out = io.BytesIO()
    np.save(out, np.ones((64, 16), np.float32))
    copies = broken_copies(out.getvalue(), max(1, round(BROKEN * scale)), 2)
    return read_all("maps_broken", "maps", ((lambda path, d=d: path.write_bytes(d)) for d in copies), scratch)


def archives_broken(scratch: pathlib.Path, scale: float) -> dict:
    """COCO's zips are read without being unpacked, or refused."""
    wholes = {name: coco_zip(name) for name in COCO_ZIPS}
    count = max(1, round(BROKEN * scale))

    def writers():
        for number in range(count):
            name = COCO_ZIPS[number % len(COCO_ZIPS)]
            draw = np.random.default_rng([3, number])
            kind = KINDS[number % len(KINDS)] if number else "none"
            broken = torture_images.MUTATIONS[kind](wholes[name], draw)
            yield lambda path, files=wholes | {name: broken}: write_files(path, files)

    return read_all("archives_broken", "archives", writers(), scratch)


COCO_ZIPS = ("train2014.zip", "val2014.zip", "annotations_trainval2014.zip", "caption_datasets.zip")


def coco_zip(name: str) -> bytes:
    """One of COCO's archives, with two pictures a year."""
    pictures = {year: [f"{year}_{n}.jpg" for n in range(2)] for year in ("train2014", "val2014")}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if (year := name.removesuffix(".zip")) in pictures:
            for picture in pictures[year]:
                archive.writestr(f"{year}/{picture}", torture_images.sound()["plain.jpg"])
        elif name == "annotations_trainval2014.zip":
            for first, (year, names) in enumerate(pictures.items()):
                ids = range(10 * first, 10 * first + 2)
                images = [{"id": n, "file_name": picture} for n, picture in zip(ids, names, strict=True)]
                captions = [{"id": n, "image_id": n, "caption": "a dog"} for n in ids]
                tree = json.dumps({"images": images, "annotations": captions})
                archive.writestr(f"annotations/captions_{year}.json", tree)
        else:
            splits = dict(zip(pictures, ("train", "val"), strict=True))
            images = [{"filename": name, "split": splits[year]} for year, names in pictures.items() for name in names]
            archive.writestr("dataset_coco.json", json.dumps({"images": images}))
    return out.getvalue()


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def models_broken(scratch: pathlib.Path, scale: float) -> dict:
    """An export whose maker has changed it and made its checksums right is read as data, or refused."""
    whole = torture_programs.model(scratch)
    about = json.loads((whole / "about.json").read_text())
    (whole / "about.json").write_text(json.dumps(about | {"files": {}}))
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())

    def write(path: pathlib.Path, number: int) -> None:
        shutil.copytree(whole, path)
        if number:
            draw = np.random.default_rng([4, number])
            file = path / names[number % len(names)]
            kind = KINDS[draw.integers(len(KINDS))]
            file.write_bytes(torture_images.MUTATIONS[kind](file.read_bytes() or b"\0", draw))
            if file.name != integrity.CHECKSUMS:
                for part in export.PARAMS:
                    integrity.write_checksums(epath.Path(path / part))

    count = max(1, round(MODELS * scale))
    return read_all("models_broken", "models", ((lambda path, n=n: write(path, n)) for n in range(count)), scratch)


CASES = [
    captions_fuzzed,
    presets_and_vocabularies_fuzzed,
    weights_broken,
    maps_broken,
    archives_broken,
    models_broken,
]
