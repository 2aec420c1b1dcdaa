"""The error for mistakes that a user can correct, and safe formatting of untrusted text in its message."""

import difflib
import json
import re
from collections.abc import Iterable

# Characters that a terminal obeys instead of printing: control characters, line separators and direction marks.
# Lone surrogates cannot be encoded at all.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """An error that the user can correct.

    Its message names the file, field or flag, what was found and what was expected. The program prints it and exits
    with status 1.
    """


def plain(text: object) -> str:
    """Returns one line that is safe to print: control characters and lone surrogates become escapes."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def shown(value: object) -> str:
    """Returns a value as JSON, safe to print and cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that is too deep to show"
    return plain(cut(text))


def quoted(value: object) -> str:
    """Returns a value's `repr`, safe to print and cut to 80 characters."""
    try:
        return plain(cut(repr(value)))
    except RecursionError:
        return f"a {type(value).__name__} that is too deep to show"


def listed(names: Iterable[object]) -> str:
    """Returns quoted names separated by commas, cut to 300 characters."""
    return cut(", ".join(map(quoted, names)), 300)


def cut(text: str, length: int = 80) -> str:
    """Returns the text, shortened to `length` characters with an ellipsis if it is longer."""
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a hint at the most similar of `names`, or "" if none is similar.

    Names may be dotted: "epochs" is similar to "train.epochs", because their last parts are equal. A name is also
    similar to its own beginning.

    Args:
      name: the misspelt name.
      names: the correct names.

    Returns:
      "; did you mean 'train.epochs'?", for the end of an error message.
    """
    names = list(names)
    last, end = {n.rsplit(".", 1)[-1]: n for n in names}, name.rsplit(".", 1)[-1]
    match = [last[end]] if end in last else difflib.get_close_matches(name, names, 1, 0.5)
    if not match:
        match = [last[m] for m in difflib.get_close_matches(end, last, 1, 0.6)]
    if not match and name:
        match = [n for n in names if n.startswith(name)]
    return f"; did you mean {match[0]!r}?" if match else ""
