"""Images from untrusted sources: damaged files and bombs, in the decoder, in `prepare` and in `caption`."""

import json
import os
import re
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from torture_cases import bombs as torture_bombs
from torture_cases import images as torture_images
from torture_cases import programs as torture_programs
from trained import Trained
from web_server import Server

from flaxcap.commands import caption
from flaxcap.commands.main import main
from flaxcap.commands.prepare import prepare
from flaxcap.config import Config, Data, Encoder
from flaxcap.files import size_limits
from flaxcap.images import decode, headers
from flaxcap.images.decode import ImageError
from flaxcap.inference import loading


@pytest.mark.parametrize("name", sorted(torture_images.sound()))
def test_valid_images_of_every_kind_are_decoded(name):
    data = torture_images.sound()[name]
    assert decode.to_square(data, 40).shape == (40, 40, 3)
    assert decode.to_thumbnail(data, 40).shape in ((30, 40, 3), (40, 30, 3))


def test_damaged_images_are_decoded_or_refused_with_a_reason():
    reasons = {name: reason_of(data) for name, data in torture_images.mutations(400, seed=1)}
    refused = [name for name, reason in reasons.items() if reason]
    assert 100 < len(refused) < 300
    assert not [name for name in refused if "-none-" in name]


def reason_of(data: bytes) -> str:
    """Returns the reason why an image is refused, or "" if it is decoded."""
    try:
        assert decode.to_square(data, 16).shape == (16, 16, 3)
    except ImageError as error:
        return str(error) or "none"
    return ""


def test_damaged_images_get_features_and_captions_or_reasons(trained: Trained, tmp_path):
    """`prepare` and `caption` read the same images, and give reasons for all others."""
    files = dict(torture_images.mutations(60, seed=2))
    rows = [{"image": name, "caption": "a picture", "split": "train"} for name in files]
    for name, data in (files | {"val.png": torture_images.sound()["plain.png"]}).items():
        (tmp_path / name).write_bytes(data)
    rows.append({"image": "val.png", "caption": "a picture", "split": "val"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder = Encoder(weights="random", block="mixed0", image_size=160, batch_size=8, shard_images=25)
    config = Config(dataset="folder", data=Data(test_split=""), encoder=encoder)
    store = prepare(config, tmp_path / "data", manual_dir=tmp_path, num_workers=2, max_bad_fraction=1)
    split = store.split("train")
    skipped = {s.filename: s.reason for s in split.skipped()}
    present = {split.rows[row].filename for row in split.present()}
    assert present | set(skipped) == set(files)
    assert not present & set(skipped)
    assert min(len(present), len(skipped)) > 10
    assert all(skipped.values())
    assert not [name for name in skipped if "-none-" in name]
    assert np.isfinite(split.read(split.present()).astype(np.float32)).all()

    captioner = loading.load_run(trained.workdir, trained.data_dir)
    sources = caption.from_sources([str(tmp_path / name) for name in files])
    found = {f.name.rpartition("/")[2]: f for f in caption.caption(captioner, sources)}
    assert {name for name, f in found.items() if f.caption} == present
    assert {name: f.reason for name, f in found.items() if f.reason} == skipped


def test_the_program_escapes_names_and_refuses_private_addresses(trained: Trained, tmp_path, capsys):
    """The terminal is ASCII-only. The file's name is not UTF-8, and its escape sequence would clear the screen."""
    run = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}"]
    name = os.fsencode(tmp_path) + b"/\xff\x1b[2J\xc3\xa9.png"
    with open(name, "wb") as file:
        file.write(torture_images.sound()["plain.png"])
    with Server() as server:
        url = f"{server.url}/a.png"
        ended = torture_programs.flaxcap("caption", tmp_path, url, *run, PYTHONIOENCODING="ascii", XLA_FLAGS="")
        assert ended.status == 1
        assert re.fullmatch(rf"{tmp_path}/\\udcff\\x1b\[2J\\xe9\.png: [a-z ]+  \(log-probability .*\)\n", ended.out)
        assert ended.err == f"{url}: 127.0.0.1 is not a public address; --allow_private_urls allows it\n"
        assert server.asked == []
        assert main(["caption", url, *run, "--allow_private_urls"]) == 1
        assert capsys.readouterr().err.startswith(f"{url}: not an image")  # downloaded: the server has no images
        assert server.asked == ["/a.png"]


SLOW = ("text.png", "tiles.tif", "12000x12000.png", "8000x8001.png")  # slow to make
REFUSED_BOMBS = [name for name, (_, read) in torture_bombs.BOMBS.items() if not read and name not in SLOW]


@pytest.mark.parametrize("name", REFUSED_BOMBS)
def test_bombs_are_refused_before_they_are_unpacked(name, monkeypatch):
    """Pillow's `load`, which unpacks the pixels, is not called."""
    monkeypatch.setattr(decode, "_resized", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ImageError, match=r"pixels|allowed|over|in text form|values|too large"):
        decode.to_square(torture_bombs.BOMBS[name][0](), 299)


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    return torture_bombs._tiff(list(entries))


SIZE = [(256, 3, 1, 10), (257, 3, 1, 10)]
BIG_TIFF = b"II+\0\x08\0\0\0" + struct.pack("<QQHHQQ", 16, 1, 258, 3, 300_000, 0)
CUT_OFF = (b"II*\0", b"II*\0\xff\xff\xff\xff", BIG_TIFF[:20], b"\x89PNG", b"GIF89a", b"\xff\xd8", b"MM\0*" + bytes(4))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(*SIZE, (322, 4, 1, 40_000), (323, 4, 1, 40_000)), "10x10 pixels in tiles of 40000x40000"),
        (tiff(*SIZE, (322, 3, 1, 40_000), (323, 4, 1, 2), (323, 4, 1, 40_000)), "tiles of 40000x40000"),
        (tiff((258, 3, 300_000, 8)), "300000 values of tag 258"),
        (tiff((273, 1, 300_000, 8)), "300000 values of tag 273"),
        (tiff((34675, 3, 300_000, 8)), "300000 values of tag 34675"),
        (b"MM\0*\0\0\0\x08\0\x01\x01\x02\0\x03\0\x04\x93\xe0\0\0\0\0", "300000 values of tag 258"),
        (
            b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\x01\x03\0\xe0\x93\x04" + bytes(13),
            "of tag 258",
        ),
    ],
)
def test_tiffs_with_huge_tags_are_refused(data, reason):
    with pytest.raises(ImageError, match=reason):
        headers.check(data)


def test_large_profiles_tiles_and_many_parts_are_accepted(monkeypatch):
    headers.check(tiff((34675, 7, 3_000_000, 8), (270, 2, 300_000, 8), *SIZE, (322, 3, 1, 512), (323, 3, 1, 512)))
    headers.check(tiff((256, 4, 1, 8000), (257, 4, 1, 8000), (322, 4, 1, 8000), (323, 4, 1, 8000)))
    for cut_off in CUT_OFF:
        assert headers.check(cut_off) == headers.Cost()
    progressive = torture_images.sound()["progressive.jpg"]
    assert 5 < headers.check(progressive).scans < 20
    # Any data may follow the image's end: phones append a video.
    video = np.random.default_rng(0).bytes(8 << 20)
    assert video.count(b"\xff\xda") > 100
    assert headers.check(progressive + video) == headers.check(progressive)
    for name, limit in (("plain.jpg", "MAX_SEGMENTS"), ("progressive.jpg", "MAX_SCANS"), ("plain.png", "MAX_CHUNKS")):
        with monkeypatch.context() as patch:
            patch.setattr(headers, limit, 2)
            with pytest.raises(ImageError, match="of over 2"):
                decode.to_square(torture_images.sound()[name], 299)


def test_the_size_limit_of_files_is_exact(monkeypatch):
    data = torture_images.sound()["plain.png"]
    monkeypatch.setattr(size_limits, "IMAGE", len(data))
    assert decode.to_square(data, 4).shape == (4, 4, 3)
    with pytest.raises(ImageError, match=f"more than the {len(data)} bytes allowed"):
        decode.to_square(data + b"x", 4)


DAMAGED = """
import io, os, pathlib
import pytest
from PIL import Image
from flaxcap.images import decode

def resident_mb():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

out = io.BytesIO()
Image.new("RGBA", (3000, 3000), "gray").save(out, "PNG")  # 36 MB unpacked
errors, before = [], resident_mb()
for _ in range(8):
    with pytest.raises(decode.ImageError, match="damaged") as found:
        decode.to_square(out.getvalue()[:-1000], 299)
    errors.append(found.value)
print(resident_mb() - before)
"""


def test_the_error_of_a_damaged_image_does_not_keep_its_pixels():
    """Runs in a new process: in this one, memory that other tests freed would hide the growth."""
    done = subprocess.run([sys.executable, "-c", DAMAGED], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 100


def test_large_images_wait_for_free_memory(monkeypatch):
    """Each image takes half of the budget, so two of four threads decode at a time."""
    monkeypatch.setattr(decode, "_MEMORY", decode._MemoryBudget(2 * 90 * 120 * decode.BYTES_A_PIXEL))
    resized, inside, most = decode._resized, set(), []
    two = threading.Barrier(2)
    lock = threading.Lock()

    def watched(image, *args):
        with lock:
            inside.add(threading.get_ident())
            most.append(len(inside))
        two.wait(60)  # raises unless two threads arrive
        with lock:
            inside.discard(threading.get_ident())
        return resized(image, *args)

    monkeypatch.setattr(decode, "_resized", watched)
    results: list[np.ndarray] = []
    data = torture_images.sound()["plain.png"]
    threads = [threading.Thread(target=lambda: results.append(decode.to_square(data, 8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert max(most) == 2
    with decode._MEMORY.reserve(10**12):  # more than the budget: alone
        assert decode._MEMORY._free == 0
    assert decode._MEMORY._free == decode._MEMORY._total
