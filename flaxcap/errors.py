"""The one kind of error that is the user's to mend, and how strangers' words stand in its message."""

import json
import re
from collections.abc import Iterable

# What a terminal obeys instead of showing it: control characters, line and direction marks; and lone surrogates, which
# cannot be printed.
_NOT_SHOWN = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Its message names the file, field or flag, what was found and what was expected; the program exits with 1."""


def plain(text: object) -> str:
    """A line that any terminal shows as it is: what would move its cursor or cannot be printed becomes an escape."""
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shown(value: object) -> str:
    """A value as JSON, cut to a length that a message can bear."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that is too deep to show"
    return plain(cut(text))


def quoted(value: object) -> str:
    """A value as Python writes it, cut likewise."""
    try:
        return plain(cut(repr(value)))
    except RecursionError:
        return f"a {type(value).__name__} that is too deep to show"


def listed(names: Iterable[object]) -> str:
    """Names one after the other, as Python writes them, cut likewise."""
    return cut(", ".join(map(quoted, names)), 300)


def cut(text: str, length: int = 80) -> str:
    """The text, without its end where it is longer."""
    return text if len(text) <= length else text[: length - 3] + "..."
