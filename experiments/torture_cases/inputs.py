"""Inputs from strangers under torture: pictures here; files and the web in files.py and web.py.

$FLAXCAP_PHOTOS may name a directory of JPEGs, some of which are broken too.
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

PICTURES = 5000
WORKERS = 2
# What decoding may take, beside what the program takes for sound pictures: as `decode.to_square` says.
DECODING_MB = (decode.MAX_MEMORY + 3 * WORKERS * size_limits.IMAGE) / 2**20


def pictures_prepared_and_captioned(scratch: pathlib.Path, scale: float) -> dict:
    """Every broken picture is captioned, or skipped with a reason, by `prepare` and `caption` alike."""
    model = torture_programs.model(scratch)
    sound = {f"sound-{name}": data for name, data in torture_images.sound().items()}
    base = _prepare(scratch / "sound", sound)[0]
    base_caption = torture_programs.succeed("caption", scratch / "sound" / "pictures", f"--model={model}")

    files = sound | dict(torture_images.mutations(max(1, round(PICTURES * scale))))
    bombs = list(torture_bombs.BOMBS.items())[: max(1, round(scale * len(torture_bombs.BOMBS)))]
    files |= {f"bomb-{name}": make() for name, (make, _) in bombs}
    tried = list(files)
    prepared, store = _prepare(scratch / "broken", files)
    files.clear()
    captioned = torture_programs.flaxcap("caption", scratch / "broken" / "pictures", f"--model={model}")

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
    told = [_told(text, scratch / "broken" / "pictures") for text in (captioned.out, captioned.err)]
    for name in tried:
        if (name in present) == bool(reasons.get(name)):
            lost[name] = "prepare: neither features nor a reason"
        elif (name in told[0]) == bool(told[1].get(name)):
            lost[name] = "caption: neither a caption nor a reason"
        elif (name in present) != (name in told[0]):
            lost[name] = f"prepare says {reasons.get(name)!r}, caption {told[1].get(name)!r}"
        elif (name.startswith("sound-") or "-none-" in name) and name not in present:
            lost[name] = f"sound, but {reasons[name]}"
    return {
        "case": "pictures_prepared_and_captioned",
        "tried": len(tried),
        "survived": len(tried) - len(lost),
        "lost": [f"{name}: {reason}" for name, reason in lost.items()],
        "captioned": len(told[0]),
        "skipped": len(told[1]),
        "prepare_mb": round(prepared.memory),
        "caption_mb": round(captioned.memory),
        "sound_mb": [round(base.memory), round(base_caption.memory)],
        "allowed_mb": round(DECODING_MB),
        "prepare_s": round(prepared.seconds, 1),
        "caption_s": round(captioned.seconds, 1),
    }


def _prepare(folder: pathlib.Path, files: dict[str, bytes]) -> tuple[torture_programs.Ended, Store]:
    """The store that `flaxcap prepare` makes of these pictures."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for name, data in files.items():
        (pictures / name).write_bytes(data)
        lines.append({"image": name, "caption": "a picture", "split": "train"})
    (pictures / "val.jpg").write_bytes(torture_images.sound()["plain.jpg"])
    lines.append({"image": "val.jpg", "caption": "a picture", "split": "val"})
    (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = Config(dataset="folder", data=Data(test_split=""), encoder=torture_programs.ENCODER)
    preset = torture_programs.write_preset(folder / "preset.json", config)
    ended = torture_programs.flaxcap(
        "prepare",
        f"--config={preset}",
        f"--data_dir={folder / 'data'}",
        f"--manual_dir={pictures}",
        "--max_bad_fraction=1",
        f"--num_workers={WORKERS}",
    )
    if ended.status:
        raise RuntimeError(f"prepare: status {ended.status}\n{ended.err[-2000:]}")
    return ended, Store(path_for(folder / "data", config))


def _told(text: str, folder: pathlib.Path) -> dict[str, str]:
    """{picture: what was said of it} of lines that start with a picture's path."""
    lines = (line.removeprefix(f"{folder}/").partition(": ") for line in text.splitlines() if str(folder) in line)
    return {name: said for name, _, said in lines if name != "val.jpg"}


DECODE = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[3])
from torture_cases.programs import peak_mb
from flaxcap.images import decode
decode.to_square(pathlib.Path(sys.argv[1]).read_bytes(), 299)  # a sound one: all that is imported late is there
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
    """Each bomb is refused, or read in bounded memory and time."""
    some = list(torture_bombs.BOMBS.items())[: max(1, round(scale * len(torture_bombs.BOMBS)))]
    (scratch / "sound.jpg").write_bytes(torture_images.sound()["plain.jpg"])
    lost, figures = [], {}
    for name, (make, may_be_read) in some:
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
        allowed = (decode.MAX_MEMORY * may_be_read + 3 * size) / 2**20 + 10
        if float(memory) > allowed:
            lost.append(f"{name}: {memory} MB, expected at most {allowed:.0f}")
        if not reason and not may_be_read:
            lost.append(f"{name}: was read, expected it to be refused")
    return {"case": "bombs", "tried": len(some), "survived": len(some) - len(lost), "lost": lost, "figures": figures}


CASES: list[Case] = [pictures_prepared_and_captioned, bombs, *torture_files.CASES, *torture_web.CASES]
