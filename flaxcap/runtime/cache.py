"""The directory for downloads and compiled programs."""

import os
import pathlib


def cache_dir() -> pathlib.Path:
    """Returns `$XDG_CACHE_HOME/flaxcap`, or `~/.cache/flaxcap` without that variable."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flaxcap"
