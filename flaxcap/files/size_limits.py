"""How much is taken of a file that nobody vouches for, in bytes."""

import errno
import os
import pathlib

from etils import epath

PICTURE = 32 << 20  # also of one from the web
PRESET = 1 << 20
VOCABULARY = 256 << 20
CAPTIONS = 4 << 30  # a file of them, as of features and predictions; COCO's annotations have 66 MB
WEIGHTS = 1 << 30  # Keras's InceptionV3 has 88 MB
EXPORT = 4 << 30  # all its files


def read(file: pathlib.Path | epath.Path, most: int) -> bytes:
    """A whole file. OSError, naming it, if it cannot be read or has more than `most` bytes."""
    data = start(file, most)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than the {most} bytes allowed", str(file))
    return data


def start(file: pathlib.Path | epath.Path, most: int) -> bytes:
    """A whole file, or the first `most` + 1 bytes of a larger one. OSError if it cannot be read."""
    with file.open("rb") as opened:
        # To ask for gigabytes of a small file would set them aside first.
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        return opened.read(min(size, most) + 1)
