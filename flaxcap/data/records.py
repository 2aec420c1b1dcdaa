"""Checked reading of the user's files: an error names the file, the record and the field."""

import pathlib
from typing import TypeVar

from flaxcap.data.base import DataError
from flaxcap.errors import listed, quoted, shown
from flaxcap.files import size_limits

T = TypeVar("T")

_KINDS: dict[type, str] = {int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def bad_record(file: object, record: str, field: str, found: str, expected: str) -> DataError:
    """Returns the error for a record of a file.

    Args:
      file: the file's name.
      record: the record's name, such as "line 3"; may be empty.
      field: the field's name; may be empty.
      found: the bad value, as the message shows it.
      expected: a description of good values.
    """
    where = ", ".join([str(file)] + [record] * bool(record) + [f"field {field!r}"] * bool(field))
    return DataError(f"{where}: found {found}, expected {expected}")


def read_field(record: object, key: str, kind: type[T], file: object, where: str) -> T:
    """Returns `record[key]`, checked.

    Args:
      record: parsed JSON.
      key: the field's name.
      kind: the field's type: int, str, list or dict.
      file: the file's name, for messages.
      where: the record's name, for messages.

    Raises:
      DataError: the record is not an object, or the field is missing, of another type, or cannot be stored.
    """
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
    """Checks that UTF-8 can encode a text from JSON.

    Args:
      text: the field's value.
      file: the file's name, for messages.
      where: the record's name, for messages.
      key: the field's name, for messages.

    Raises:
      DataError: the text has a lone surrogate, which JSON can hold as `"\\ud83d"`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_record(file, where, key, f"half a character, {quoted(text[error.start])}", "text") from error


def read_bytes(path: pathlib.Path) -> bytes:
    """Reads a file of captions.

    Raises:
      DataError: the file cannot be read, or is larger than `size_limits.CAPTIONS`.
    """
    try:
        return size_limits.read(path, size_limits.CAPTIONS)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_image(path: pathlib.Path) -> bytes:
    """Reads an image file, at most one byte more than `size_limits.IMAGE`.

    A file that is too large thus stays too large, and `images.decode` refuses it.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        return size_limits.start(path, size_limits.IMAGE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: pathlib.Path) -> str:
    """Reads a file of captions in UTF-8, with or without byte order mark.

    Raises:
      DataError: the file cannot be read, is larger than `size_limits.CAPTIONS`, or is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_record(path, f"line {line}", "", f"the byte 0x{data[error.start]:02x}", "UTF-8") from error
