"""Cases of untrusted inputs: images. files.py and web.py have the cases of other files and of the web.

$FLAXCAP_PHOTOS may name a directory of JPEG files. Some of them are then broken, too.
"""

import json
import pathlib
import sys
from collections.abc import Callable

from torture_cases import bombs as torture_bombs
from torture_cases import files as torture_files
from torture_cases import images as torture_images
from torture_cases import programs as torture_programs
from torture_cases import web as torture_web

from flaxcap.config import Config, Data
from flaxcap.features.store import Store, path_for
from flaxcap.files import size_limits
from flaxcap.images import decode

Case = Callable[[pathlib.Path, float], dict]

IMAGES = 5000
WORKERS = 2
# The memory that decoding may take, in addition to that for sound images: the bound of `decode.to_square`.
DECODING_MB = (decode.MAX_MEMORY + 3 * WORKERS * size_limits.IMAGE) / 2**20


def images_prepared_and_captioned(scratch: pathlib.Path, scale: float) -> dict:
    """Prepares and captions broken images. Both commands accept the same ones and give reasons for the others."""
    model = torture_programs.model(scratch)
    sound = {f"sound-{name}": data for name, data in torture_images.sound().items()}
    base = _prepare(scratch / "sound", sound)[0]
    base_caption = torture_programs.succeed("caption", scratch / "sound" / "images", f"--model={model}")

    files = sound | dict(torture_images.mutations(max(1, round(IMAGES * scale))))
    bombs = list(torture_bombs.BOMBS.items())[: max(1, round(scale * len(torture_bombs.BOMBS)))]
    files |= {f"bomb-{name}": make() for name, (make, _) in bombs}
    tried = list(files)
    prepared, store = _prepare(scratch / "broken", files)
    files.clear()
    captioned = torture_programs.flaxcap("caption", scratch / "broken" / "images", f"--model={model}")

    lost: dict[str, str] = {}
    for what, ended, sane, first in (
        ("prepare", prepared, (0,), base),
        ("caption", captioned, (0, 1), base_caption),
    ):
        if ended.status not in sane:
            lost[what] = f"status {ended.status}: {ended.err[-500:]}"
        elif ended.memory > first.memory + DECODING_MB:
            lost[what] = f"{ended.memory:.0f} MB, expected at most {first.memory + DECODING_MB:.0f}"
    split = store.split("train")
    reasons = {skipped.filename: skipped.reason for skipped in split.skipped()}
    present = {split.rows[row].filename for row in split.present()}
    captions, complaints = (_by_image(text, scratch / "broken" / "images") for text in (captioned.out, captioned.err))
    for name in tried:
        if (name in present) == bool(reasons.get(name)):
            lost[name] = "prepare: neither features nor a reason"
        elif (name in captions) == bool(complaints.get(name)):
            lost[name] = "caption: neither a caption nor a reason"
        elif (name in present) != (name in captions):
            lost[name] = f"prepare says {reasons.get(name)!r}, caption {complaints.get(name)!r}"
        elif (name.startswith("sound-") or "-none-" in name) and name not in present:
            lost[name] = f"sound, but {reasons[name]}"
    return {
        "case": "images_prepared_and_captioned",
        "tried": len(tried),
        "survived": len(tried) - len(lost),
        "lost": [f"{name}: {reason}" for name, reason in lost.items()],
        "captioned": len(captions),
        "skipped": len(complaints),
        "prepare_mb": round(prepared.memory),
        "caption_mb": round(captioned.memory),
        "sound_mb": [round(base.memory), round(base_caption.memory)],
        "allowed_mb": round(DECODING_MB),
        "prepare_s": round(prepared.seconds, 1),
        "caption_s": round(captioned.seconds, 1),
    }


def _prepare(folder: pathlib.Path, files: dict[str, bytes]) -> tuple[torture_programs.Ended, Store]:
    """Runs `flaxcap prepare` on these images. Returns its result and the store."""
    images = folder / "images"
    images.mkdir(parents=True)
    lines = []
    for name, data in files.items():
        (images / name).write_bytes(data)
        lines.append({"image": name, "caption": "a picture", "split": "train"})
    (images / "val.jpg").write_bytes(torture_images.sound()["plain.jpg"])
    lines.append({"image": "val.jpg", "caption": "a picture", "split": "val"})
    (images / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = Config(dataset="folder", data=Data(test_split=""), encoder=torture_programs.ENCODER)
    preset = torture_programs.write_preset(folder / "preset.json", config)
    ended = torture_programs.flaxcap(
        "prepare",
        f"--config={preset}",
        f"--data_dir={folder / 'data'}",
        f"--manual_dir={images}",
        "--max_bad_fraction=1",
        f"--num_workers={WORKERS}",
    )
    if ended.status:
        raise RuntimeError(f"prepare: status {ended.status}\n{ended.err[-2000:]}")
    return ended, Store(path_for(folder / "data", config))


def _by_image(text: str, folder: pathlib.Path) -> dict[str, str]:
    """Returns {image: rest of the line} for lines that start with an image's path."""
    lines = (line.removeprefix(f"{folder}/").partition(": ") for line in text.splitlines() if str(folder) in line)
    return {name: rest for name, _, rest in lines if name != "val.jpg"}


DECODE = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[3])
from torture_cases.programs import peak_mb
from flaxcap.images import decode
decode.to_square(pathlib.Path(sys.argv[1]).read_bytes(), 299)  # loads the modules that are imported late
before, begin = peak_mb(), time.perf_counter()
data = pathlib.Path(sys.argv[2]).read_bytes()
try:
    decode.to_square(data, 299)
    reason = ""
except decode.ImageError as e:
    reason = str(e)
print(time.perf_counter() - begin, peak_mb() - before, reason.splitlines()[0] if reason else "")
"""


def bombs(scratch: pathlib.Path, scale: float) -> dict:
    """Decodes each bomb. It is refused, or read in bounded memory and time."""
    some = list(torture_bombs.BOMBS.items())[: max(1, round(scale * len(torture_bombs.BOMBS)))]
    (scratch / "sound.jpg").write_bytes(torture_images.sound()["plain.jpg"])
    lost, figures = [], {}
    for name, (make, readable) in some:
        file = scratch / name
        file.write_bytes(make())
        size = file.stat().st_size
        command = (sys.executable, "-c", DECODE, scratch / "sound.jpg", file, pathlib.Path(__file__).parent.parent)
        ended = torture_programs.run(*command, within_s=300)
        file.unlink()
        if ended.status:
            lost.append(f"{name}: status {ended.status}: {ended.err[-300:]}")
            continue
        seconds, memory, reason = ended.out.strip("\n").split(" ", 2)
        figures[name] = {"bytes": size, "s": round(float(seconds), 2), "mb": round(float(memory)), "reason": reason}
        allowed = (decode.MAX_MEMORY * readable + 3 * size) / 2**20 + 10
        if float(memory) > allowed:
            lost.append(f"{name}: {memory} MB, expected at most {allowed:.0f}")
        if not reason and not readable:
            lost.append(f"{name}: was read, expected to be refused")
    return {"case": "bombs", "tried": len(some), "survived": len(some) - len(lost), "lost": lost, "figures": figures}


CASES: list[Case] = [images_prepared_and_captioned, bombs, *torture_files.CASES, *torture_web.CASES]
