"""Checksums find every changed byte, in files, directories and sealed JSON; writes are atomic."""

import json
import pathlib

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.files import integrity
from flaxcap.files.integrity import Checksum, DamagedError, WriteError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def path_of(path: pathlib.Path) -> epath.Path:
    return epath.Path(path)


@given(st.dictionaries(st.text(), JSON).filter(lambda tree: "sha256" not in tree), st.sampled_from([None, 1, 2]))
def test_unseal_returns_what_was_sealed(tree, indent):
    text = integrity.seal(tree, indent)
    assert integrity.unseal(text.encode(), indent) == tree
    assert integrity.seal(json.loads(text), indent) == text  # sealed twice is sealed once


@pytest.mark.parametrize("indent", [None, 2])
def test_unseal_finds_any_changed_bit_and_any_truncation(indent):
    tree = {"files": {"a/ü.json": {"size": 10, "sha256": "ab"}}, "skipped": [1.5, None, "犬 “x”"]}
    sound = integrity.seal(tree, indent).encode()
    for position in range(len(sound)):
        for bit in range(8):
            data = bytearray(sound)
            data[position] ^= 1 << bit
            with pytest.raises((ValueError, RecursionError)):
                integrity.unseal(bytes(data), indent)
        with pytest.raises((ValueError, RecursionError)):  # truncated
            integrity.unseal(sound[:position], indent)


def test_json_without_a_seal_is_damaged():
    for unsealed in (b'{"skipped": []}', b'{"files": {}}', b"{}"):
        with pytest.raises(DamagedError, match="another SHA-256 of the content than its field sha256 says"):
            integrity.unseal(unsealed)
    for other in (b"[]", b"null", b"7"):
        with pytest.raises(ValueError, match="expected an object"):
            integrity.unseal(other)


def test_checksums_of_bytes_and_of_files_agree(tmp_path):
    assert integrity.Checksum.of_bytes(b"") == Checksum(0, EMPTY)
    for size in (0, 1, 1 << 20, (1 << 20) + 1):
        data, progress = bytes(i % 251 for i in range(size)), []
        (tmp_path / "f").write_bytes(data)
        assert integrity.Checksum.of_file(path_of(tmp_path / "f"), progress.append) == integrity.Checksum.of_bytes(data)
        assert sum(progress) == size


def test_the_message_says_how_a_file_differs(tmp_path):
    file, expected = path_of(tmp_path / "f"), integrity.Checksum.of_bytes(b"abc")
    with pytest.raises(DamagedError, match=r"^missing$"):
        integrity.check(file, expected)
    with pytest.raises(DamagedError, match=r"^missing$"):
        integrity.check_size(file, expected)
    for data, found in (
        (b"ab", "damaged: found 2 bytes, expected 3"),
        (b"abd", "damaged: found SHA-256 a52d159f262b…"),
    ):
        file.write_bytes(data)
        with pytest.raises(DamagedError, match=f"^{found}"):
            integrity.check(file, expected)
        with pytest.raises(DamagedError, match=f"^{found}"):
            integrity.check_bytes(data, expected)
    integrity.check_size(file, expected)  # compares no content
    file.write_bytes(b"ab")
    with pytest.raises(DamagedError, match="found 2 bytes, expected 3"):
        integrity.check_size(file, expected)
    file.write_bytes(b"abc")
    integrity.check(file, expected)


@pytest.fixture
def directory(tmp_path) -> epath.Path:
    for name in ("a", "b/c", "b/d/e", "b/empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "b/empty" else name.encode() * 9)
    integrity.write_checksums(path_of(tmp_path))
    return path_of(tmp_path)


def test_a_sound_directory_has_no_damage(directory):
    assert list(integrity.find_damage(directory)) == []
    assert set(integrity.read_checksums(directory)) == {"a", "b/c", "b/d/e", "b/empty"}
    (directory / "new").write_text("has no checksum, and is not damage")
    assert list(integrity.find_damage(directory)) == []
    integrity.write_checksums(directory, ["b/c"])
    assert set(integrity.read_checksums(directory)) == {"b/c"}


@pytest.mark.parametrize("name", ["a", "b/c", "b/d/e", "b/empty"])
def test_damage_of_every_file_of_a_directory_is_found(directory, name):
    file, progress = directory / name, []
    sound = file.read_bytes()
    for data in (sound + b"x", sound[:-1], b"X" + sound[1:], None):
        if data == sound:
            continue
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        ((path, found),) = integrity.find_damage(directory, progress.append)
        assert path == file
        assert found.startswith("missing" if data is None else "damaged: found")
        assert not list(integrity.find_damage(directory, among=lambda other: other != name))
        file.write_bytes(sound)
    assert sum(progress)


def test_missing_and_damaged_checksums_are_damage(directory):
    file = directory / integrity.CHECKSUMS
    sound = file.read_bytes()
    outside = integrity.seal({"files": {"../f": {"size": 1, "sha256": "a"}}}, indent=1).encode()
    for data in (sound.replace(b"size", b"sice", 1), sound[:-9], b"", b"{}", b'{"files": 3}', b"\xff", outside):
        file.write_bytes(data)
        ((path, found),) = integrity.find_damage(directory)
        assert path == file
        assert found.startswith("damaged")
    file.unlink()
    assert list(integrity.find_damage(directory)) == [(file, "missing")]


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "../x", "a/../../x", "a/.."])
def test_names_outside_the_directory_are_refused(name):
    assert not integrity.is_inside(name)
    assert integrity.is_inside(f"a{name.replace('..', '.')}/...")


def test_a_write_that_fails_leaves_no_partial_file(tmp_path):
    (tmp_path / "f").mkdir()  # a file cannot replace a directory
    with pytest.raises(WriteError, match=r"f: cannot be written \(.*is a directory\)"):
        integrity.write_atomically(path_of(tmp_path / "f"), "text")
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
