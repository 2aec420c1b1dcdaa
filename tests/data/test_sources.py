"""The files that a data set was read from: which changes are noticed, and which do not count."""

import os
import pathlib
import shutil
import zipfile

import pytest
from etils import epath

from flaxcap.data import sources


def write(folder: pathlib.Path, **files: str) -> list[str]:
    for name, text in files.items():
        (folder / name).write_text(text)
    return list(files)


def test_times_alone_are_no_change_but_are_noted(tmp_path):
    names = write(tmp_path, a="1", b="2")
    before = sources.look(tmp_path, names)
    os.utime(tmp_path / "a", ns=(5, 5))
    after = sources.look(tmp_path, names, before)
    assert sources.changed(before, after) == []
    assert after.files["a"].mtime == 5
    assert after.fingerprint == before.fingerprint


def test_content_additions_and_removals_are_changes(tmp_path):
    names = write(tmp_path, same="1", changed="2", removed="3")
    before = sources.look(tmp_path, [*names, "later"])
    write(tmp_path, changed="4", later="5")
    os.utime(tmp_path / "changed", ns=(5, 5))  # the size is the same
    (tmp_path / "removed").unlink()
    after = sources.look(tmp_path, ["same", "changed", "removed", "later"], before)
    assert sorted(sources.changed(before, after)) == ["changed", "later", "removed"]
    assert after.fingerprint != before.fingerprint
    assert sources.changed(before, sources.look(tmp_path, ["same"], after)) == ["changed", "removed", "later"]


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    names = write(tmp_path, a="1", b="2")
    before = sources.look(tmp_path, names)
    write(tmp_path, b="other")
    read = []
    monkeypatch.setattr(sources, "_content", lambda path: read.append(path.name) or "new")
    assert sources.changed(before, sources.look(tmp_path, names, before)) == ["b"]
    assert read == ["b"]


def test_a_moved_folder_has_the_same_fingerprint(tmp_path):
    (tmp_path / "old").mkdir()
    names = write(tmp_path / "old", a="1", b="2")
    before = sources.look(tmp_path / "old", names)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    assert sources.look(tmp_path / "new", names).fingerprint == before.fingerprint


def test_the_members_of_a_zip_decide(tmp_path):
    def pack(*members: tuple[str, str], compression: int = zipfile.ZIP_STORED) -> str:
        with zipfile.ZipFile(tmp_path / "images.zip", "w", compression) as archive:
            for name, text in members:
                archive.writestr(name, text)
        return sources.look(tmp_path, ["images.zip"]).fingerprint

    first = pack(("a.jpg", "1"), ("b.jpg", "2"))
    assert pack(("a.jpg", "1"), ("b.jpg", "2"), compression=zipfile.ZIP_DEFLATED) == first
    assert pack(("a.jpg", "1"), ("b.jpg", "3")) != first
    assert pack(("a.jpg", "1")) != first
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04 damaged")
    assert sources.look(tmp_path, ["images.zip"]).fingerprint != first


@pytest.mark.parametrize("names", [[], ["é.jpg", 'quo"te', "line\nend", "missing"]])
def test_what_is_written_is_read(tmp_path, names):
    write(tmp_path, **dict.fromkeys(names[:3], "x"))
    found = sources.look(tmp_path, names)
    sources.write(epath.Path(tmp_path), found)
    assert sources.read(epath.Path(tmp_path)) == found


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"names": []}'])
def test_a_damaged_file_is_no_file(tmp_path, text):
    if text is not None:
        (tmp_path / sources.SOURCES).write_text(text)
    assert sources.read(epath.Path(tmp_path)) is None
