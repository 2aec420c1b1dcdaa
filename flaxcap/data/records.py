"""Checked reading of the user's files: an error names the file, the record and the field."""

import os
import pathlib
from typing import TypeVar

from flaxcap.data.base import DataError
from flaxcap.errors import listed, quoted, shown
from flaxcap.files import size_limits

T = TypeVar("T")


def bad_record(file: object, record: str, field: str, found: str, expected: str) -> DataError:
    """The error for one field of one record of a file; `record` and `field` may be empty."""
    where = ", ".join([str(file)] + [record] * bool(record) + [f"field {field!r}"] * bool(field))
    return DataError(f"{where}: found {found}, expected {expected}")


_KINDS: dict[type, str] = {int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def read_field(record: object, key: str, kind: type[T], file: object, where: str) -> T:
    """`record[key]` of a parsed JSON record; DataError where there is none, it is no `kind` or cannot be stored."""
    if not isinstance(record, dict):
        raise bad_record(file, where, "", shown(record), "an object")
    if key not in record:
        raise bad_record(file, where, key, "none, only " + (listed(record) or "{}"), _KINDS[kind])
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise bad_record(file, where, key, shown(value), _KINDS[kind])
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise bad_record(file, where, key, shown(value), "a whole number of 64 bits")
    if isinstance(value, str):
        check_text(value, file, where, key)
    return value


def check_text(text: str, file: object, where: str, key: str) -> None:
    """DataError for half a character, which JSON can hold as `"\\ud83d"`, and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_record(file, where, key, f"half a character, {quoted(text[error.start])}", "text") from error


def read_bytes(path: pathlib.Path) -> bytes:
    """A file; DataError where it cannot be read or is larger than `limits.CAPTIONS`."""
    try:
        return size_limits.read(path, size_limits.CAPTIONS)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_image(path: pathlib.Path) -> bytes:
    """A picture's file; of one larger than `size_limits.IMAGE` a byte more than that, which decoding then refuses."""
    try:
        return size_limits.start(path, size_limits.IMAGE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file, with or without byte order mark; DataError where it cannot be read or is not UTF-8."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_record(path, f"line {line}", "", f"the byte 0x{data[error.start]:02x}", "UTF-8") from error


def image_path(folder: pathlib.Path, name: str, file: object, record: str, key: str) -> pathlib.Path:
    """`folder/name`, an existing file; DataError where it is missing or `name` leads out of the folder."""
    parts = pathlib.PurePath(name).parts
    if not parts or pathlib.PurePath(name).is_absolute() or ".." in parts:
        raise bad_record(file, record, key, quoted(name), f"a path inside {folder}")
    if not os.path.isfile(folder / name):  # unlike pathlib's it says no to any name, however long
        raise bad_record(file, record, key, f"{quoted(name)}, which is not in {folder}", "an image file")
    return folder / name
