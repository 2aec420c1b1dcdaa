"""Tables and JSON lines with an image and a caption in each record."""

import csv
import io
import json
import pathlib
from collections.abc import Iterator

from flaxcap.data.base import DataError
from flaxcap.data.layouts.record import ImageRecord
from flaxcap.data.records import bad_record, check_text, read_field, read_text
from flaxcap.errors import listed, shown


def read_csv(
    file: pathlib.Path,
    image: tuple[str, ...],
    caption: tuple[str, ...],
    *,
    more: bool,
    folders: tuple[str, ...] = (),
    split: str | None = None,
) -> Iterator[ImageRecord]:
    """Yields a record for each row. The last column may contain commas that are not quoted, if it is the caption.

    Args:
      file: the table; its first line names the columns.
      image: possible names of the column of images.
      caption: possible names of the column of captions.
      more: further columns are ignored; otherwise they are refused.
      folders: of the records.
      split: of all records, unless the table has a column "split".

    Raises:
      DataError: a column or a value is missing, or the file is not CSV.
    """
    rows = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        columns = [_column(header, names) for names in (image, caption)]
        known = {*image, *caption, "split"}
        if None in columns or len(set(header)) != len(header) or not (more or set(header) <= known):
            expected = f"the columns {' or '.join(image)}, {' or '.join(caption)} and, optionally, split"
            raise bad_record(file, "line 1", "", shown(header), expected)
        at_image, at_caption = (column or 0 for column in columns)
        at_split = header.index("split") if "split" in header else None
        last = len(header) - 1
        for row in rows:
            where = f"line {rows.line_num}"
            if len(row) > len(header) and at_caption == last:
                row[last:] = [",".join(row[last:])]
            if not row:
                continue
            if len(row) != len(header):
                expected = f"{len(header)}; quote text that contains commas"
                raise bad_record(file, where, "", f"{len(row)} values", expected)
            of_row = split if at_split is None else row[at_split]
            yield ImageRecord(row[at_image], (row[at_caption],), file, where, of_row, None, header[at_image], folders)
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: not CSV: {error}") from error


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    """Returns the number of the only column with one of the names."""
    found = [number for number, name in enumerate(header) if name in names]
    return found[0] if len(found) == 1 else None


def read_lines(
    file: pathlib.Path,
    image: str,
    caption: tuple[str, ...],
    *,
    more: bool,
    folders: tuple[str, ...] = (),
    split: str | None = None,
) -> Iterator[ImageRecord]:
    """Yields a record for each line with a JSON object. The caption is a string, or a list of strings.

    Args:
      file: the JSON lines.
      image: the key of the image.
      caption: possible keys of the caption, or captions.
      more: further keys are ignored; otherwise they are refused.
      folders: of the records.
      split: of all records, unless they have a key "split".

    Raises:
      DataError: a key is missing or unknown, or a value has another type.
    """
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        record = parse(line, f"{file}, {where}")
        name = read_field(record, image, str, file, where)
        assert isinstance(record, dict)
        keys = [key for key in caption if key in record]
        unknown = not more and set(record) - {image, "split", *caption}
        if unknown or len(keys) != 1:
            lacking = "" if unknown or keys else caption[0]
            expected = f"{image}, {' or '.join(caption)}, and optionally split"
            raise bad_record(file, where, lacking, f"the keys {listed(record)}", expected)
        of_line = read_field(record, "split", str, file, where) if "split" in record else split
        texts = _texts(record, keys[0], file, where, plural=more or keys[0].endswith("s"))
        yield ImageRecord(name, texts, file, where, of_line, None, image, folders)


def _texts(record: dict, key: str, file: pathlib.Path, where: str, *, plural: bool) -> tuple[str, ...]:
    """Returns the caption, or the captions where a list is allowed."""
    found = record[key]
    if not plural or (isinstance(found, str) and not key.endswith("s")):
        return (read_field(record, key, str, file, where),)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise bad_record(file, where, key, shown(found), "a list of strings")
    for each in found:
        check_text(each, file, where, key)
    return tuple(found)


def parse(text: str | bytes, where: str) -> object:
    """Parses JSON. Raises DataError, which begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
