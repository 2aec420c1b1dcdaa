"""Size limits, in bytes, for files from untrusted sources."""

import errno
import os
import pathlib

from etils import epath

IMAGE = 32 << 20
PRESET = 1 << 20
VOCABULARY = 256 << 20
CAPTIONS = 4 << 30  # a file of captions or predictions; COCO's annotations have 66 MB
WEIGHTS = 1 << 30  # of an encoder
EXPORT = 4 << 30  # the sum of all files


def read(file: pathlib.Path | epath.Path, most: int) -> bytes:
    """Reads a complete file.

    Raises:
      OSError: the file cannot be read, or has more than `most` bytes. The message names the file.
    """
    data = start(file, most)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than the {most} bytes allowed", str(file))
    return data


def start(file: pathlib.Path | epath.Path, most: int) -> bytes:
    """Reads a file, but at most its first `most` + 1 bytes.

    Raises:
      OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        # `read(most)` of CPython allocates `most` bytes first, gigabytes for a small file.
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        return opened.read(min(size, most) + 1)
