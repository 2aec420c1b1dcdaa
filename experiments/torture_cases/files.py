"""Cases of untrusted files: captions, presets, vocabularies, weights, feature maps, archives and exports."""

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
FILES_A_PROCESS = 100
KINDS = [kind for kind in torture_images.MUTATIONS if kind not in ("sizes", "none")]
READING_MB = 1000  # memory that broken files may take, in addition to that for a sound file


def fuzzed(name: str, count: int, *kinds: tuple[SearchStrategy, Callable[[Any], str]]) -> dict:
    """Draws examples of strategies and judges each.

    Args:
      name: of the case.
      count: examples of each strategy.
      kinds: strategies with their judges. A judge returns a mistake, or "".
    """
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
            if wrong := judge(made):  # noqa: B023  # called before the loop's next turn
                lost.setdefault(wrong, repr(made)[:500])

        each()  # pyright: ignore[reportCallIssue]
    listed = [f"{wrong}: {made}" for wrong, made in lost.items()]
    return {"case": name, "tried": tried, "survived": tried - len(lost), "lost": listed}


def captions_fuzzed(scratch: pathlib.Path, scale: float) -> dict:
    """Reads caption files. Captions come back as they were written, or the error names file, record and field."""
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
    """Reads broken presets, vocabularies and predictions. The error names the file and the field."""
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
    "models": "from flaxcap.inference import loading\nread = lambda path: loading.load_export(path)",
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
    """Reads broken files in processes of their own, and compares their memory with that for the first, sound file.

    Args:
      name: of the case.
      reader: a key of `READERS`.
      broken: functions that write one file each.
      scratch: where the files are written.
    """
    lost, counts, memory, first = [], {"read": 0, "refused": 0}, 0.0, 0.0
    tried = 0
    while some := [write for _, write in zip(range(FILES_A_PROCESS if first else 1), broken, strict=False)]:
        folder = scratch / "broken"
        folder.mkdir()
        for number, write in enumerate(some, tried):
            write(folder / f"{number:05d}{'.npy' if reader == 'maps' else ''}")
        tried += len(some)
        ended = torture_programs.run(sys.executable, "-c", READERS[reader] + READ_ALL, folder, within_s=1800)
        shutil.rmtree(folder)
        lines = [line.partition(" ")[::2] for line in ended.out.splitlines() if line[:5].isdecimal()]
        for path, outcome in lines:
            if outcome in counts:
                counts[outcome] += 1
            else:
                lost.append(f"{path}: {outcome or 'its reader died'}")
        if ended.status:
            lost.append(f"{lines[-1][0] if lines else 'none'}: status {ended.status}: {ended.err[-300:]}")
        first = first or ended.memory
        memory = max(memory, ended.memory)
    if memory > first + READING_MB:
        lost.append(f"{memory:.0f} MB, expected at most {first + READING_MB:.0f}")
    figures = {"mb": round(memory), "sound_mb": round(first), **counts}
    return {"case": name, "tried": tried, "survived": counts["read"] + counts["refused"], "lost": lost, **figures}


def broken_copies(sound: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yields the file itself, then `count` - 1 broken copies."""
    yield sound
    for number in range(1, count):
        draw = np.random.default_rng([seed, number])
        yield torture_images.MUTATIONS[KINDS[number % len(KINDS)]](sound, draw)


def write_weights(file: pathlib.Path | io.BytesIO, **options: Any) -> h5py.File:
    """Writes InceptionV3's weights up to mixed0. Every number of kernel N is N.

    Args:
      file: a path, or a buffer.
      options: of HDF5, for the first kernel.

    Returns:
      The open file.
    """
    found = h5py.File(file, "w")
    for number, shape in enumerate(network.kernel_shapes("mixed0").values(), 1):
        kernel = np.full(shape, number, np.float32)
        found.create_dataset(f"conv2d_{number}/kernel:0", data=kernel, **(options if number == 1 else {}))
        for name in ("beta", "moving_mean", "moving_variance"):
            found[f"batch_normalization_{number}/{name}:0"] = np.ones(shape[-1:], np.float32)
    return found


def weights_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Reads broken weights. They are read as data, or refused."""
    out = io.BytesIO()
    write_weights(out, compression="gzip").close()
    sound = out.getvalue()
    count = max(1, round(BROKEN * scale))

    def copies():
        yield sound
        # HDF5's structures are a small part of the file. Two of three changes are made there.
        structures = [found.start() for found in re.finditer(b"TREE|HEAP|SNOD|OHDR", sound)]
        for number in range(1, count):
            draw = np.random.default_rng([1, number])
            changed = bytearray(sound)
            near = draw.choice(structures, 4) + draw.integers(0, 600, 4)
            for byte in near if number % 3 else draw.integers(0, len(sound), 4):
                changed[byte % len(sound)] = draw.integers(256)
            yield bytes(changed) if number % 10 else bytes(changed[: draw.integers(len(sound))])

    return read_all("weights_broken", "weights", ((lambda path, d=d: path.write_bytes(d)) for d in copies()), scratch)


def maps_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Reads broken feature maps. They are read as numbers, or refused."""
    out = io.BytesIO()
    np.save(out, np.ones((64, 16), np.float32))
    copies = broken_copies(out.getvalue(), max(1, round(BROKEN * scale)), 2)
    return read_all("maps_broken", "maps", ((lambda path, d=d: path.write_bytes(d)) for d in copies), scratch)


def archives_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Reads broken zips of COCO. They are read without being unpacked, or refused."""
    sound = {name: coco_zip(name) for name in COCO_ZIPS}
    count = max(1, round(BROKEN * scale))

    def writers():
        for number in range(count):
            name = COCO_ZIPS[number % len(COCO_ZIPS)]
            draw = np.random.default_rng([3, number])
            kind = KINDS[number % len(KINDS)] if number else "none"
            broken = torture_images.MUTATIONS[kind](sound[name], draw)
            yield lambda path, files=sound | {name: broken}: write_files(path, files)

    return read_all("archives_broken", "archives", writers(), scratch)


COCO_ZIPS = ("train2014.zip", "val2014.zip", "annotations_trainval2014.zip", "caption_datasets.zip")


def coco_zip(name: str) -> bytes:
    """Returns one of COCO's archives, with two images of each part."""
    names = {year: [f"{year}_{n}.jpg" for n in range(2)] for year in ("train2014", "val2014")}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if (part := name.removesuffix(".zip")) in names:
            for file in names[part]:
                archive.writestr(f"{part}/{file}", torture_images.sound()["plain.jpg"])
        elif name == "annotations_trainval2014.zip":
            for first, (part, files) in enumerate(names.items()):
                ids = range(10 * first, 10 * first + 2)
                images = [{"id": n, "file_name": file} for n, file in zip(ids, files, strict=True)]
                captions = [{"id": n, "image_id": n, "caption": "a dog"} for n in ids]
                tree = json.dumps({"images": images, "annotations": captions})
                archive.writestr(f"annotations/captions_{part}.json", tree)
        else:
            splits = dict(zip(names, ("train", "val"), strict=True))
            images = [{"filename": file, "split": splits[part]} for part, files in names.items() for file in files]
            archive.writestr("dataset_coco.json", json.dumps({"images": images}))
    return out.getvalue()


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def models_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Reads exports that were changed and have matching checksums. They are read as data, or refused."""
    sound = torture_programs.model(scratch)
    about = json.loads((sound / "about.json").read_text())
    (sound / "about.json").write_text(json.dumps(about | {"files": {}}))
    names = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())

    def write(path: pathlib.Path, number: int) -> None:
        shutil.copytree(sound, path)
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
